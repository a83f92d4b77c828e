"""ModelShape + layout + precision -> Megatron's TransformerConfig: the one function that knows its field names."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer import TransformerConfig

from megatron_prolong.errors import UserError
from megatron_prolong.mcore.specs import runs_on_transformer_engine
from megatron_prolong.recipe.fp8 import Fp8Recipe, fp8_problem
from megatron_prolong.recipe.schema import Layout, recomputes_every_layer
from megatron_prolong.recipe.shape import ModelShape


def params_dtype(precision: str) -> torch.dtype:
    """Dtype of weights and activations; fp8 keeps bf16 weights and casts inside the GEMMs."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def transformer_config(
    shape: ModelShape,
    layout: Layout,
    *,
    precision: str,
    recompute: str,
    fp8_recipe: Fp8Recipe = "tensorwise",
    fp8_parameters: bool = False,
    rank_tokens: int = 0,
) -> TransformerConfig:
    """Build the config of one stage.

    Args:
        shape: the Llama model.
        layout: tp, pp, cp and their options.
        precision: "fp32", "bf16", or "fp8" for FP8 matrix products on bf16 weights.
        recompute: "none", "selective" (the MLP, whose activations are the largest), "full" (every layer),
            "all_but_attention" (every layer; kept_attention.py) or "block:N" (the first N layers of each chunk).
        fp8_parameters: keep the weights of fp8 layers in fp8 only; for training.
        rank_tokens: the most tokens that one rank holds at a time, where that may be very many.

    Raises:
        UserError: this machine cannot run that precision.
    """
    dtype = params_dtype(precision)
    on_gpu = torch.cuda.is_available()
    on_te = runs_on_transformer_engine(dtype)
    if problem := precision_problem(precision, fp8_recipe, layout.cp):
        raise UserError(problem)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        softmax_scale=shape.softmax_scale,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights always come from a checkpoint, so that every layout starts from the same numbers. Megatron must
        # still initialise them: without it, weights lack the tensor_model_parallel mark that gradient norms need.
        perform_initialization=True,
        use_cpu_initialization=not on_gpu,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_pp if layout.virtual_pp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        # The interleaved schedule with two stages sends both ways between the same two ranks: one batch of
        # operations cannot tell them apart (Megatron-LM's arguments.py refuses that pair too).
        overlap_p2p_comm=layout.virtual_pp > 1,
        batch_p2p_comm=layout.virtual_pp == 1,
        # What was sent is kept by the next stage. Interleaved, Megatron 0.16.1 frees it while it is being sent
        # (Megatron-LM 4047: NaN, later): gloo and NCCL both read the memory when the receiver is ready.
        deallocate_pipeline_outputs=layout.pp > 1 and layout.virtual_pp == 1,
        context_parallel_size=layout.cp,
        cp_comm_type=layout.cp_exchange,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Micro-batches are bags of documents, so their lengths differ.
        variable_seq_lengths=layout.pp > 1,
        moe_token_dispatcher_type="alltoall",  # no experts here, but variable lengths refuse the default
        # The loss is a sum; finalize_model_grads divides by the valid tokens of the whole global batch.
        calculate_per_token_loss=True,
        attention_softmax_in_fp32=True,
        # Of the embedding, whose gradient Megatron then adds up in order.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        # These fusions are torch.compile'd, TE's or Apex's kernels, made for CUDA.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        apply_rope_fusion=on_te and fused_rotation_fits(shape, layout.tp, rank_tokens),
        masked_softmax_fusion=False,
        # Megatron asks for Apex's extension even where TE's linears would do the work.
        gradient_accumulation_fusion=on_te and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **_recompute(recompute),
        **(_fp8(fp8_recipe, fp8_parameters) if precision == "fp8" else {}),
    )


def fused_rotation_fits(shape: ModelShape, tp: int, rank_tokens: int) -> bool:
    """Whether Transformer Engine's rotation can address the keys of so many tokens: it counts elements in 32 bits
    (2.12, fused_rope.cu: offset_block), and each key lies in a row of the query, key and value products."""
    row = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tp
    return 1.1 * rank_tokens * row < 2**31  # a tenth for the padding of documents


def precision_problem(precision: str, fp8_recipe: Fp8Recipe, cp: int) -> str | None:
    """Why this machine cannot run that precision, or None."""
    if precision == "fp32" and torch.cuda.is_available():
        return "precision: fp32 runs on CPU only (the attention kernels of GPUs are bf16); use bf16"
    if precision != "fp8":
        return None
    if not runs_on_transformer_engine(torch.bfloat16):
        return "precision: fp8 needs CUDA and Transformer Engine (see `prolong doctor`); use bf16"
    return fp8_problem(fp8_recipe, torch.cuda.get_device_capability(), cp)


def _fp8(recipe: Fp8Recipe, parameters: bool) -> dict[str, object]:
    """E4M3 forward and E5M2 backward ("hybrid"), or E4M3 throughout where every 32 values have a scale; the first
    and last layer in bf16 where the recipe allows it (Megatron-Bridge's training/mixed_precision.py)."""
    history: dict[str, object] = {
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        # Maxima are shared behind every micro-batch, of which data-parallel ranks have different numbers.
        "tp_only_amax_red": True,
    }
    return {
        "fp8": "e4m3" if recipe == "mxfp8" else "hybrid",
        "fp8_recipe": recipe,
        "fp8_param": parameters,
        **(history if recipe == "delayed" else {"first_last_layers_bf16": True}),
    }


def _recompute(mode: str) -> dict[str, object]:
    whole = {"recompute_granularity": "full"}
    if recomputes_every_layer(mode):
        return {**whole, "recompute_method": "uniform", "recompute_num_layers": 1}
    if mode.startswith("block:"):
        num_layers = int(mode.removeprefix("block:"))
        return {**whole, "recompute_method": "block", "recompute_num_layers": num_layers}
    if mode == "selective":
        # Not "layernorm": TE's norms are part of the linears, and without TE Megatron 0.16.1 cannot (NameError).
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {}

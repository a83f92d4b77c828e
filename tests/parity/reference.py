"""A small Hugging Face Llama as the reference, and its weights put into our model by code of the test's own.

The mapping here is written independently of `convert/`, so that a mistake there cannot hide itself.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_prolong.mcore.gpt import LongContextGPT
from megatron_prolong.recipe.shape import ModelShape

LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}


def reference_llama(
    *,
    rope_base: float = 5e5,
    scaling: dict[str, object] | None = None,
    tied: bool = False,
    vocab_size: int = 1000,
) -> LlamaForCausalLM:
    """4 layers, 8 query heads in 2 groups, no bias; every weight random, norms away from one."""
    torch.manual_seed(0)
    rope = {"rope_theta": rope_base, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,  # a multiple of 32, for FP8
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope,
        attention_bias=False,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.uniform_(0.5, 1.5)
            else:
                # Large enough that attention is far from uniform and every gradient matters.
                param.normal_(std=0.08 if "embed" not in name else 0.5)
    return model


def shape_of(model: LlamaForCausalLM) -> ModelShape:
    """ModelShape of the reference through its config.json content."""
    return ModelShape.from_hf(model.config.to_dict(), "reference")


def copy_weights(model: LlamaForCausalLM, ours: LongContextGPT) -> None:
    """Fill an unsplit (tp 1, pp 1) model with the reference's weights."""
    with torch.no_grad():
        for name, value in megatron_weights(model).items():
            parameter = ours.get_parameter(name)
            parameter.zero_()
            parameter[: value.shape[0]].copy_(value)


def megatron_weights(model: LlamaForCausalLM, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Every weight (or its gradient) of the reference, named and laid out as in Megatron's GPTModel."""

    def tensor(parameter: torch.nn.Parameter) -> torch.Tensor:
        if gradients:
            assert parameter.grad is not None
            return parameter.grad
        return parameter.data

    config = model.config
    groups, head = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    named = {
        "embedding.word_embeddings.weight": tensor(model.model.embed_tokens.weight),
        "decoder.final_layernorm.weight": tensor(model.model.norm.weight),
    }
    if not config.tie_word_embeddings:
        named["output_layer.weight"] = tensor(model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"decoder.layers.{index}."
        q, k, v = (
            tensor(projection.weight).reshape(groups, -1, head, config.hidden_size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        qkv = torch.cat([q, k, v], dim=1).reshape(-1, config.hidden_size)
        fc1 = torch.cat([tensor(mlp.gate_proj.weight), tensor(mlp.up_proj.weight)])
        named |= {
            f"{prefix}input_layernorm.weight": tensor(layer.input_layernorm.weight),
            f"{prefix}self_attention.linear_qkv.weight": qkv,
            f"{prefix}self_attention.linear_proj.weight": tensor(attention.o_proj.weight),
            f"{prefix}pre_mlp_layernorm.weight": tensor(layer.post_attention_layernorm.weight),
            f"{prefix}mlp.linear_fc1.weight": fc1,
            f"{prefix}mlp.linear_fc2.weight": tensor(mlp.down_proj.weight),
        }
    return named

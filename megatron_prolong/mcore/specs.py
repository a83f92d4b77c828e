"""Layer specs: which modules a transformer layer is made of. Transformer Engine where it can run, else native."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_prolong.mcore.attention import DocumentAttention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019), usable with sequence parallelism.

    Megatron's WrappedTorchNorm refuses sequence parallelism; all it needs is the mark on the weight that makes
    finalize_model_grads all-reduce its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis of `hidden` [..., H]; dtype kept."""
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def layer_spec(
    *, qkv: type, attention: type, proj: type, fc1: type, fc2: type, norm: type = IdentityOp
) -> ModuleSpec:
    """A Llama layer of these modules; `norm` is left out where `qkv` and `fc1` begin with one of their own.

    Norms of their own are saved under the names of Transformer Engine's fused LayerNorm-Linear, so that one
    checkpoint serves every spec.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv,
                    core_attention=attention,
                    linear_proj=proj,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The `num_layers` layers of one pipeline stage and the final norm."""
    if runs_on_transformer_engine(config.params_dtype):
        from megatron_prolong.mcore.transformer_engine import transformer_engine_block_spec

        return transformer_engine_block_spec(num_layers)
    return native_block_spec(num_layers)


def runs_on_transformer_engine(dtype: torch.dtype) -> bool:
    """True on CUDA with Transformer Engine; fp32 stays native, for TE's fp32 attention materialises the scores."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available() and dtype != torch.float32


def native_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` layers of Megatron's parallel linears with our norm and core attention, and the final norm."""
    layer = layer_spec(
        qkv=ColumnParallelLinear,
        attention=DocumentAttention,
        proj=RowParallelLinear,
        fc1=ColumnParallelLinear,
        fc2=RowParallelLinear,
        norm=RMSNorm,
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)

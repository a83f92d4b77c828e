"""Layers on NVIDIA Transformer Engine: norm and linear in one, FP8 products, cuDNN or FlashAttention-3 kernels.

Used only where CUDA and Transformer Engine are there (`specs.block_spec`). The modules are Megatron's wrappers of
TE; what is ours is how documents are handed to its attention. Weights have the same names as in the native spec.
"""

from __future__ import annotations

import copy
import os
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_prolong.mcore.attention import DocumentAttention, Documents
from megatron_prolong.mcore.specs import layer_spec
from megatron_prolong.model.context_parallel import ContextParallel, split_attention
from megatron_prolong.model.context_plan import zigzag_order
from megatron_prolong.recipe.layout_rules import te_exchanges

# cuDNN plans its kernels anew, for good and in tenths of a second, for every number of documents beyond this
# (TE 2.12, fused_attn/utils.cu: get_max_batch_size); empty documents round it up.
GRAPH_DOCUMENTS = 512


class TransformerEngineAttention(DocumentAttention):
    """Documents through TEDotProductAttention in its packed "thd" format.

    Without context parallelism, one call. With it, two: the documents split over the ranks (TE's zigzag layout and
    its exchange, or ours where TE refuses it for packed documents), and those that are whole on this rank, without
    any exchange. Generation with a cache stays with DocumentAttention, as does all attention on GPUs where TE has
    no kernel for packed documents (`has_packed_kernels`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config, layer_number)
        arguments = (layer_number, attn_mask_type, attention_type)
        alone = copy.copy(config)  # not replace(): Megatron's __post_init__ is not made to run twice
        alone.context_parallel_size = 1
        self.whole = TEDotProductAttention(alone, *arguments, pg_collection=pg_collection)
        self.split = None
        cp = config.context_parallel_size
        kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        if cp > 1 and te_exchanges(cp_comm_type or "", cp, kv_heads):
            self.split = TEDotProductAttention(
                config, *arguments, cp_comm_type=cp_comm_type, pg_collection=pg_collection
            )
            if cp_comm_type == "a2a":
                _order_at_once()

    def attend(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents) -> tuple[Tensor, ...]:
        """As DocumentAttention.attend."""
        if documents.caches is not None:
            return super().attend(q_TND, k_TGD, v_TGD, documents)
        end = len(q_TND)
        boundaries = documents.cu_seqlens
        first = boundaries[0]  # behind the split documents
        outs = []
        if first:
            assert documents.context is not None
            outs.append(self._attend_split(q_TND[:first], k_TGD[:first], v_TGD[:first], documents.context))
        if end > first:
            packed = whole_documents(boundaries, end, q_TND.device)
            k, v = k_TGD[first:], v_TGD[first:]
            if first:  # TE refuses keys and values that do not begin their memory (utils.py: get_qkv_layout)
                k, v = k.clone(), v.clone()
            outs.append(self._attend(self.whole, (q_TND[first:], k, v), packed))
        return tuple(outs)  # flat already: [T, N·D]

    def _attend_split(self, q: Tensor, k: Tensor, v: Tensor, context: ContextParallel) -> Tensor:
        if self.split is not None:
            return self._attend(self.split, (q, k, v), split_documents(context, q.device))
        return split_attention(q, k, v, context).flatten(1)

    @staticmethod
    def _attend(
        attention: torch.nn.Module, qkv: tuple[Tensor, Tensor, Tensor], packed: PackedSeqParams
    ) -> Tensor:
        return attention(*qkv, None, AttnMaskType.causal, packed_seq_params=packed)


def whole_documents(boundaries: tuple[int, ...], end: int, device: torch.device) -> PackedSeqParams:
    """Documents `boundaries` of this rank's slice, which ends at `end`; padding is one more document."""
    ends = [*boundaries, end] if end > boundaries[-1] else list(boundaries)
    return _packed(tuple(position - boundaries[0] for position in ends), device)


def split_documents(context: ContextParallel, device: torch.device) -> PackedSeqParams:
    """The documents split over the context-parallel ranks, their lengths over all of these ranks.

    The padding behind a document counts as its last tokens: under a causal mask no other token sees them. Told of
    padding apart (cu_seqlens_q_padded), TE 2.11 overlooks that of the last document (`pad_between_seqs` in
    dot_product_attention.py, issue 3331) and then cuts its keys short, and leaves padded rows uninitialised.
    """
    return _packed(context.plan.cu_seqlens_padded, device)


@lru_cache(maxsize=64)  # every layer of a micro-batch asks for the same
def _packed(cu_seqlens: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    longest = max(stop - start for start, stop in pairwise(cu_seqlens))
    if (documents := len(cu_seqlens) - 1) > GRAPH_DOCUMENTS:
        cu_seqlens += cu_seqlens[-1:] * (-documents % GRAPH_DOCUMENTS)
    lengths = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _order_at_once() -> None:
    """Let TE's all-to-all look up the order of tokens. TE 2.12 makes it anew for each tensor of each layer, and
    fetches the 4·cp numbers that it takes of every document from the GPU one by one (context_parallel.py)."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel as exchange

    if hasattr(exchange, "reorder_seq_chunks_after_a2a_before_attn_thd"):  # TE 2.20 has a kernel instead
        exchange.reorder_seq_chunks_after_a2a_before_attn_thd = to_documents
        exchange.reorder_seq_chunks_before_a2a_after_attn_thd = to_slices


def to_documents(x: Tensor, cu_seqlens: Tensor, _: Any, cp_size: int, seq_dim: int = 0) -> Tensor:
    """The slices of all ranks, one after another, in document order."""
    return x.index_select(seq_dim, _order(cu_seqlens, cp_size))


def to_slices(x: Tensor, cu_seqlens: Tensor, cp_size: int, seq_dim: int = 0) -> Tensor:
    """The reverse of `to_documents`."""
    return x.new_empty(x.shape).index_copy_(seq_dim, _order(cu_seqlens, cp_size), x)


def _order(cu_seqlens: Tensor, cp_size: int) -> Tensor:
    chunks = tuple((stop - start) // (2 * cp_size) for start, stop in pairwise(cu_seqlens.tolist()))
    return zigzag_order(chunks, cp_size, cu_seqlens.device)


def has_packed_kernels() -> bool:
    """Whether TE attends packed documents on this GPU without materialising the scores.

    cuDNN does on Hopper and Blackwell for data centers, elsewhere only the flash-attn package; without either TE
    falls back on scores of length times length (dot_product_attention/utils.py: get_attention_backend). So does
    cuDNN in its backward where PyTorch or TE is told to be deterministic; PyTorch's own kernel does not.
    """
    tolerant = int(os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"))
    if torch.are_deterministic_algorithms_enabled() or not tolerant:
        return False
    return torch.cuda.get_device_capability()[0] in (9, 10) or _takes_flash_attention()


def _takes_flash_attention() -> bool:
    """Whether the flash-attn package is there in a version that TE takes (2.12: 2.1.1 to 2.8.3)."""
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils

    return bool(FlashAttentionUtils.is_installed)


def transformer_engine_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """`num_layers` TE layers (those of one pipeline stage) and the final norm."""
    layer = layer_spec(
        qkv=TELayerNormColumnParallelLinear,
        attention=TransformerEngineAttention if has_packed_kernels() else DocumentAttention,
        proj=TERowParallelLinear,
        fc1=TELayerNormColumnParallelLinear,
        fc2=TERowParallelLinear,
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)

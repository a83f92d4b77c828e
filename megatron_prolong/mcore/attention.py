"""Core attention behind Megatron's SelfAttention: causal within documents, split over context-parallel ranks.

Megatron's own local DotProductAttention materialises the scores and refuses packed sequences and context
parallelism. This module keeps Megatron's interface and calls the mathematics of `model/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_prolong.mcore.kept_attention import KeptAttention
from megatron_prolong.model.attention import cached_attention, packed_attention
from megatron_prolong.model.context_parallel import ContextParallel, context_attention
from megatron_prolong.model.spread_cache import shared_attention, sliced_attention


@dataclass
class KeyValueCache:
    """Keys and values of one sequence's tokens so far, per layer: [S, G, D] each, grown by doubling.

    Attributes:
        length: tokens kept here; with a spread cache a part of them.
        position: tokens of the sequence so far, on all ranks.
    """

    length: int = 0
    position: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, key_TGD: Tensor, value_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values; return all of them. `advance` once every layer has."""
        end = self.length + key_TGD.shape[0]
        if layer not in self.layers or self.layers[layer][0].shape[0] < end:
            self.layers[layer] = (self._grown(layer, 0, key_TGD, end), self._grown(layer, 1, value_TGD, end))
        keys, values = self.layers[layer]
        keys[self.length : end] = key_TGD
        values[self.length : end] = value_TGD
        return keys[:end], values[:end]

    def _grown(self, layer: int, which: int, new_TGD: Tensor, end: int) -> Tensor:
        _, num_heads, head_dim = new_TGD.shape
        # One head's rows lie together in memory: a decoding step reads them twice as fast.
        grown = new_TGD.new_empty((num_heads, max(end, 2 * self.length), head_dim)).transpose(0, 1)
        if layer in self.layers:
            grown[: self.length] = self.layers[layer][which][: self.length]
        return grown

    def advance(self, kept: int, read: int) -> None:
        """Count the tokens that every layer has appended here, and those that all ranks have read."""
        self.length += kept
        self.position += read


@dataclass(frozen=True)
class Spread:
    """Where the new tokens are when caches are spread over context-parallel ranks.

    Attributes:
        chunk_tokens: set when this rank has one slice of a chunk of one document; else every rank has all new
            tokens of every document.
        keeps: of which documents this rank keeps the keys and values.
    """

    group: dist.ProcessGroup
    chunk_tokens: int | None
    keeps: tuple[bool, ...]


@dataclass(kw_only=True)
class Documents(PackedSeqParams):
    """What the attention of one micro-batch must know; travels where Megatron passes packed_seq_params.

    `qkv_format` is "sbhd", so that Megatron applies the rotary angles we give it token by token instead of
    deriving them from cu_seqlens: positions are then right for any slice of any document.

    Attributes:
        cu_seqlens: cumulative starts of the documents that are whole on this rank, and the end of the last.
        context: set when the micro-batch is split over context-parallel ranks.
        caches: set when generating: one per document, whose new tokens are those of this micro-batch.
        spread: set when these caches are spread over ranks.
        kept: set when layers are recomputed but not their attention: by layer number, between the two passes.
    """

    cu_seqlens: tuple[int, ...]
    context: ContextParallel | None = None
    caches: tuple[KeyValueCache, ...] | None = None
    spread: Spread | None = None
    kept: dict[int, KeptAttention] | None = None

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"


class DocumentAttention(MegatronModule):
    """softmax(q·kᵀ/√d)·v, causal within each document, without materialising scores.

    Takes query [T, 1, N, D], key and value [T, 1, G, D] of this tensor-parallel rank's heads and this
    context-parallel rank's tokens; returns [T, 1, N·D].
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        # Kernels and exchanges behind `attend` divide scores by √d; what else a model asks for, its queries bring.
        scale = config.softmax_scale
        self.query_factor = None if scale is None else scale * math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """See the class; `packed_seq_params` must be `Documents`, masks and biases are not used."""
        assert isinstance(packed_seq_params, Documents), "DocumentAttention needs Documents"
        if self.query_factor is not None:
            query = query * self.query_factor
        # Values are a view of the packed projections, all of which would stay for the backward.
        outs = self._attend_once(query[:, 0], key[:, 0], value[:, 0].contiguous(), packed_seq_params)
        # A single part is not copied: both would stay for the backward.
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return torch.flatten(out, start_dim=1).unsqueeze(1)

    def _attend_once(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, ...]:
        """`attend`, or in the second pass through a recomputed layer what the first one kept."""
        if documents.kept is None:
            return self.attend(q, k, v, documents)
        if self.layer_number in documents.kept:
            return documents.kept.pop(self.layer_number).again(q, k, v)
        kept = KeptAttention(partial(self.attend, documents=documents), q, k, v)
        documents.kept[self.layer_number] = kept
        return kept.outs

    def attend(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, documents: Documents) -> tuple[Tensor, ...]:
        """out_TND of this rank's tokens, in parts to be concatenated; other kernels override this."""
        q, k, v = q_TND, k_TGD, v_TGD
        if documents.caches is not None:
            return self._cached(q, k, v, documents)
        if documents.context is not None:
            return context_attention(q, k, v, documents.context)
        return (packed_attention(q, k, v, documents.cu_seqlens),)

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, ...]:
        """Each document's new tokens against all of its cached ones, of which other ranks may have a part."""
        assert documents.caches is not None
        spread = documents.spread
        keeps = spread.keeps if spread else (True,) * len(documents.caches)
        spans = pairwise(documents.cu_seqlens)
        outs: list[Tensor] = []
        for cache, keeper, (start, end) in zip(documents.caches, keeps, spans, strict=True):
            new, kept = q[start:end], slice(start, end if keeper else start)
            keys, values = cache.extend(self.layer_number, k[kept], v[kept])
            if spread is None:
                outs.append(cached_attention(new, keys, values))
            elif spread.chunk_tokens is not None:
                outs.append(sliced_attention(new, keys, values, spread.chunk_tokens, spread.group))
            else:
                outs.append(shared_attention(new, keys, values, keeper, spread.group))
        return tuple(outs)

"""Causal self-attention of packed documents, and attention of new tokens over a key/value cache.

A packed sequence holds documents one after another; `cu_seqlens` are their starts and the end of the last. No
token sees another document, no score matrix or mask is ever built, and the backward is exact. Under tensor
parallelism the heads are this rank's; context parallelism is context_parallel.py.

Axes: T tokens (queries), S cached keys, N query heads, G key/value heads, R = N / G, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_prolong.model.flash import Block, attend, attend_backward, block_forward


def packed_attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cu_seqlens: Sequence[int],
) -> Tensor:
    """Attention that is causal inside each document and blind across documents.

    Args:
        q_TND, k_TGD, v_TGD: one packed sequence, N a multiple of G. Autograd flows to all three.
        cu_seqlens: document starts and the end of the last. Empty documents are allowed. Tokens behind the last
            document are padding: they get 0, see nothing.

    Returns:
        out_TND in q's dtype.
    """
    return BlockAttention.apply(q_TND, k_TGD, v_TGD, document_blocks(tuple(cu_seqlens)), True)


@torch.no_grad()
def cached_attention(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor) -> Tensor:
    """Attention of the newest T of S tokens of one document, for chunked prefill and decoding.

    Query i sees keys 0 … S-T+i. No gradient. Returns out_TND.
    """
    return cache_forward(q_TND, k_SGD, v_SGD, causal=True)[0]


def cache_forward(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """`flash.block_forward` of new tokens over a cache: out_TND and lse_TN.

    A single token sees every key. Its query heads that share a key/value head run as the queries of one block, so
    that decoding reads the cache once, not once for each of them.
    """
    if len(q_TND) != 1:
        return block_forward(q_TND, k_SGD, v_SGD, causal)
    q_RGD = q_TND.unflatten(1, (k_SGD.shape[1], -1))[0].transpose(0, 1)
    out_RGD, lse_RG = block_forward(q_RGD, k_SGD, v_SGD, causal=False)
    return out_RGD.transpose(0, 1).flatten(0, 1).unsqueeze(0), lse_RG.T.flatten().unsqueeze(0)


@lru_cache(maxsize=64)
def document_blocks(cu_seqlens: tuple[int, ...]) -> tuple[Block, ...]:
    """One square block per document. Cached: every layer asks for the same pack."""
    return tuple(Block(start, stop, start, stop) for start, stop in pairwise(cu_seqlens))


class BlockAttention(torch.autograd.Function):
    """`flash.attend` with its backward; saves q, k, v, the output and one number per head and token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], causal: bool) -> Tensor:
        out, lse = attend(q, k, v, blocks, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = blocks, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(dout, *ctx.saved_tensors, *ctx.arguments), None, None

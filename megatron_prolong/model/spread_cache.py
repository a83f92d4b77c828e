"""Attention over a key/value cache that is spread over context-parallel ranks: no rank holds a whole context.

Keys and values stay where they were made; the queries go to them. Every rank attends to what it has with the
queries of all, and the partial results are combined by their log-sum-exp (the algebra of ring attention, Liu et
al. 2023, with queries passed instead of keys). What travels is as long as the new tokens, never as the context.

New tokens come in two ways. *Sliced*: a prefill's chunk is cut into one slice per rank, in order, and each rank
keeps its slice's keys and values. *Shared*: every rank has all new tokens (a decoding step), and one of them keeps
theirs. No gradient.

Axes: T new tokens (of this rank's slice, or shared), S keys and values on this rank with the newest last, N query
heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prolong.model.attention import cache_forward
from megatron_prolong.model.flash import Block, attend


def slice_of(num_tokens: int, rank: int, num_ranks: int) -> slice:
    """This rank's slice of a chunk: equal ones, the last shorter."""
    size = -(-num_tokens // num_ranks)
    return slice(min(rank * size, num_tokens), min((rank + 1) * size, num_tokens))


def can_slice(num_tokens: int, num_ranks: int) -> bool:
    """Whether every rank gets a token of the chunk."""
    return num_tokens > num_ranks * (num_ranks - 1)


@torch.no_grad()
def sliced_attention(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, num_tokens: int, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's slice of a chunk of `num_tokens`; every rank of `group` must call it."""
    mine = slice_of(num_tokens, dist.get_rank(group), dist.get_world_size(group))
    q_all = gather_slices(q_TND, num_tokens, group)
    num_keys, num_old = len(k_SGD), len(k_SGD) - len(q_TND)
    # Queries before the slice see only the earlier chunks here, those of the slice also their own past.
    before = (Block(0, mine.start, 0, num_old),)
    within = (Block(mine.start, mine.stop, 0, num_keys),)
    after = (Block(mine.stop, num_tokens, 0, num_keys),)
    out, lse = attend(q_all, k_SGD, v_SGD, within, True)
    for blocks in (before, after):
        part_out, part_lse = attend(q_all, k_SGD, v_SGD, blocks, False)
        out, lse = out + part_out, torch.maximum(lse, part_lse)  # no query is in two of them
    weighted = _weighted(out, lse, group)
    size = len(q_all) // dist.get_world_size(group)
    total = weighted.new_empty((size, *weighted.shape[1:]))
    dist.reduce_scatter_tensor(total, weighted, group=group)
    return _divided(total[: len(q_TND)]).to(q_TND.dtype)


@torch.no_grad()
def shared_attention(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, keeper: bool, group: dist.ProcessGroup
) -> Tensor:
    """Attention of tokens that all ranks of `group` have; the keys and values of the `keeper` end with theirs."""
    out, lse = cache_forward(q_TND, k_SGD, v_SGD, causal=keeper)
    weighted = _weighted(out, lse, group)
    dist.all_reduce(weighted, group=group)
    return _divided(weighted).to(q_TND.dtype)


def gather_slices(slice_T: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """The slices of all ranks in order, padded at the end to a multiple of the number of ranks."""
    size = dist.get_world_size(group)
    padded = slice_T.new_zeros((-(-num_tokens // size), *slice_T.shape[1:]))
    padded[: len(slice_T)] = slice_T
    gathered = padded.new_empty((size * len(padded), *padded.shape[1:]))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered


def _weighted(out_TND: Tensor, lse_TN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Numerator and, behind it, denominator of the softmax over all ranks' keys, up to one factor: [T, N, D+1]."""
    # NCCL sends nothing else, and a GPU's kernel has it by heads.
    highest_TN = lse_TN.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(highest_TN, op=dist.ReduceOp.MAX, group=group)
    highest_TN.masked_fill_(highest_TN == -torch.inf, 0.0)  # padding sees nothing anywhere
    weight_TN1 = torch.exp(lse_TN - highest_TN).unsqueeze(-1)
    return torch.cat([out_TND * weight_TN1, weight_TN1], dim=-1)


def _divided(weighted: Tensor) -> Tensor:
    return weighted[..., :-1] / weighted[..., -1:]

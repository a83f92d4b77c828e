"""Attention over a packed sequence whose tokens are spread over context-parallel ranks.

`ContextPlan` says who holds what. Local documents are attended to where they are; split documents exchange
keys and values in one of four ways, all exact, forward and backward:

- all_gather: every rank gathers all keys and values. Simple, latency of one collective; memory of all keys
  and values of one layer while it runs (gathered again in the backward, not kept).
- p2p: a ring. Keys and values travel from rank to rank while the block at hand is computed; partial results
  are merged by their log-sum-exp (Liu et al. 2023). The backward passes gradients around the same ring.
- a2a: all-to-all turns slices of tokens into slices of heads and back (Ulysses, Jacobs et al. 2023). Each
  rank then sees whole documents of its heads. Needs query heads in a multiple of cp; fewer key/value heads
  than ranks are repeated.
- a2a+p2p: all-to-all inside groups of neighbouring ranks, a ring between the groups (Fang and Zhao 2024). The
  zigzag slices of a group are together a zigzag slice of longer chunks, so the ring is the same code; p2p is
  a group of one, a2a is a single group.

The padding of a split document is behind its last token, where the causal mask hides it. Bytes sent per rank
and layer, for a split part of T tokens a rank, K = T·G·D numbers: all_gather and p2p 2K(cp-1) forward and
about three times that backward (keys and values once more, and their gradients in fp32); a2a (2TND +
2K)(cp-1)/cp.

Axes: T tokens of a slice, N query heads, G key/value heads, D head dimension; of this tensor-parallel rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prolong.model.attention import BlockAttention, document_blocks
from megatron_prolong.model.context_plan import ContextPlan, zigzag_order
from megatron_prolong.model.flash import Block, attend, attend_backward, merge


@dataclass(frozen=True)
class ContextParallel:
    """How this rank takes part in the exchange of one micro-batch.

    Attributes:
        plan: which documents are split over the context-parallel ranks and which stay whole on one.
        rank: this rank among them.
        group: the ranks.
        exchange: "all_gather", "p2p", "a2a" or "a2a+p2p".
        subgroups: for a2a+p2p, the inner group of neighbouring ranks and the outer group, one of each inner.
    """

    plan: ContextPlan
    rank: int
    group: dist.ProcessGroup
    exchange: str
    subgroups: tuple[dist.ProcessGroup, ...] = ()


def context_attention(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, context: ContextParallel
) -> tuple[Tensor, ...]:
    """Causal attention within documents, of this rank's slice; every rank of the group must call it.

    Args:
        q_TND, k_TGD, v_TGD: this rank's slice after `plan.take`, rotary embedding applied.

    Returns:
        out_TND of the split documents and of the whole ones, where there are any: the slice in its order, 0 on the
        padding behind the documents.
    """
    split_tokens = context.plan.split_tokens
    parts = []
    if split_tokens:
        q, k, v = (x[:split_tokens] for x in (q_TND, k_TGD, v_TGD))
        parts.append(split_attention(q, k, v, context))
    if split_tokens < len(q_TND):
        q, k, v = (x[split_tokens:] for x in (q_TND, k_TGD, v_TGD))
        starts = context.plan.local_cu_seqlens(context.rank)
        blocks = document_blocks(tuple(start - split_tokens for start in starts))
        parts.append(BlockAttention.apply(q, k, v, blocks, True))
    return tuple(parts)


def split_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, context: ContextParallel) -> Tensor:
    """`context_attention` of the split documents alone, of each of which a rank holds two chunks; out_TND."""
    chunk_tokens = context.plan.chunk_tokens
    if context.exchange == "all_gather":
        out: Tensor = _GatherAttention.apply(q_TND, k_TGD, v_TGD, chunk_tokens, context.rank, context.group)
        return out
    inner, outer = _levels(context)
    return _head_ring_attention(q_TND, k_TGD, v_TGD, chunk_tokens, inner, outer)


def _levels(context: ContextParallel) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The group of the all-to-all and the group of the ring."""
    if context.exchange == "p2p":
        return None, context.group
    if context.exchange == "a2a":
        return context.group, None
    inner, outer = context.subgroups
    return inner, outer


# --- all_gather ---------------------------------------------------------------------------------------------


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chunk_tokens: tuple[int, ...],
        rank: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        whole_k, whole_v = _gather(torch.stack((k, v)), chunk_tokens, group)
        first, second = _gathered_blocks(chunk_tokens, rank, dist.get_world_size(group))
        out, lse = attend(q, whole_k, whole_v, first, True)
        second_out, second_lse = attend(q, whole_k, whole_v, second, True)
        out, lse = out + second_out, torch.maximum(lse, second_lse)  # no query is in both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = chunk_tokens, rank, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        chunk_tokens, rank, group = ctx.arguments
        whole_k, whole_v = _gather(torch.stack((k, v)), chunk_tokens, group)
        dq = torch.zeros_like(q)
        whole_dkv = torch.zeros((2, *whole_k.shape), dtype=lse.dtype, device=q.device)
        for blocks in _gathered_blocks(chunk_tokens, rank, dist.get_world_size(group)):
            part = attend_backward(dout, q, whole_k, whole_v, out, lse, blocks, True)
            dq += part[0]
            whole_dkv[0] += part[1]
            whole_dkv[1] += part[2]
            del part  # whole sequences' gradients: not one more while the next call makes its own
        dk, dv = _scatter_sum(whole_dkv, chunk_tokens, group).to(k.dtype)
        return dq, dk, dv, None, None, None


@lru_cache(maxsize=64)
def _gathered_blocks(
    chunk_tokens: tuple[int, ...], rank: int, cp_size: int
) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Each chunk of this rank against its document from the start to the chunk's end; first and second chunks
    apart, because they share keys."""
    first, second = [], []
    q_start = k_start = 0
    for chunk in chunk_tokens:
        q_middle = q_start + chunk
        first.append(Block(q_start, q_middle, k_start, k_start + (rank + 1) * chunk))
        second.append(Block(q_middle, q_middle + chunk, k_start, k_start + (2 * cp_size - rank) * chunk))
        q_start, k_start = q_start + 2 * chunk, k_start + 2 * cp_size * chunk
    return tuple(first), tuple(second)


def _gather(kv_2TGD: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """Keys and values of all ranks in document order, [2, cp·T, G, D]."""
    kv_T2GD = kv_2TGD.transpose(0, 1).contiguous()
    size = dist.get_world_size(group)
    gathered = kv_T2GD.new_empty((size * len(kv_T2GD), *kv_T2GD.shape[1:]))
    dist.all_gather_into_tensor(gathered, kv_T2GD, group=group)
    return gathered[zigzag_order(chunk_tokens, size, gathered.device)].transpose(0, 1)


def _scatter_sum(whole_2SGD: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    """The reverse of `_gather`: this rank's rows of the sum over ranks, [2, T, G, D]."""
    size = dist.get_world_size(group)
    by_rank = torch.empty_like(whole_2SGD.transpose(0, 1), memory_format=torch.contiguous_format)
    by_rank[zigzag_order(chunk_tokens, size, by_rank.device)] = whole_2SGD.transpose(0, 1)
    mine = by_rank.new_empty((len(by_rank) // size, *by_rank.shape[1:]))
    dist.reduce_scatter_tensor(mine, by_rank, group=group)
    return mine.transpose(0, 1)


# --- p2p, a2a and both --------------------------------------------------------------------------------------


def _head_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_tokens: tuple[int, ...],
    inner: dist.ProcessGroup | None,
    outer: dist.ProcessGroup | None,
) -> Tensor:
    """All-to-all over `inner`, ring over `outer`, all-to-all back; None is a group of one."""
    if inner is None or (inner_size := dist.get_world_size(inner)) == 1:
        return _RingAttention.apply(q, k, v, chunk_tokens, outer)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    shared_heads = math.lcm(num_kv_heads, inner_size)
    assert num_heads % shared_heads == 0, "recipe/layout_rules.py refuses such a layout"
    k, v = (x.repeat_interleave(shared_heads // num_kv_heads, dim=1) for x in (k, v))
    q, k, v = (_HeadsForTokens.apply(x, chunk_tokens, inner) for x in (q, k, v))
    longer_chunks = tuple(inner_size * chunk for chunk in chunk_tokens)
    out = _RingAttention.apply(q, k, v, longer_chunks, outer)
    return _TokensForHeads.apply(out, chunk_tokens, inner)


class _HeadsForTokens(torch.autograd.Function):
    """[T, N, D] of this rank's tokens to [A·T, N/A, D] of its A neighbours' tokens in document order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.arguments = chunk_tokens, group
        return _heads_for_tokens(x, chunk_tokens, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _tokens_for_heads(dx, *ctx.arguments), None, None


class _TokensForHeads(torch.autograd.Function):
    """The reverse of `_HeadsForTokens`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.arguments = chunk_tokens, group
        return _tokens_for_heads(x, chunk_tokens, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _heads_for_tokens(dx, *ctx.arguments), None, None


def _heads_for_tokens(x_TND: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    num_tokens, num_heads, head_dim = x_TND.shape
    by_head_rank = x_TND.view(num_tokens, size, num_heads // size, head_dim).transpose(0, 1).contiguous()
    by_token_rank = torch.empty_like(by_head_rank)
    dist.all_to_all_single(by_token_rank, by_head_rank, group=group)
    return by_token_rank.flatten(0, 1)[zigzag_order(chunk_tokens, size, x_TND.device)]


def _tokens_for_heads(x_TND: Tensor, chunk_tokens: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    num_tokens, num_heads, head_dim = x_TND.shape
    by_token_rank = torch.empty_like(x_TND, memory_format=torch.contiguous_format)
    by_token_rank[zigzag_order(chunk_tokens, size, x_TND.device)] = x_TND
    by_head_rank = torch.empty_like(by_token_rank)
    dist.all_to_all_single(by_head_rank, by_token_rank, group=group)
    by_head_rank = by_head_rank.view(size, num_tokens // size, num_heads, head_dim)
    return by_head_rank.transpose(0, 1).reshape(num_tokens // size, size * num_heads, head_dim)


class _RingAttention(torch.autograd.Function):
    """Queries stay, keys and values travel to the next rank of the ring, cp-1 times."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chunk_tokens: tuple[int, ...],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ring = _Ring(group)
        kv = torch.stack((k, v))
        for step in range(ring.size):
            arriving = ring.pass_on(kv) if step < ring.size - 1 else None  # while this block is computed
            blocks, causal = _ring_blocks(chunk_tokens, ring.rank, ring.source(step))
            part_out, part_lse = attend(q, kv[0], kv[1], blocks, causal)
            if step == 0:
                out, lse = part_out, part_lse
            else:
                out, lse = merge(out, lse, part_out, part_lse)
            if arriving is not None:
                kv = arriving.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = chunk_tokens, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        chunk_tokens, group = ctx.arguments
        ring = _Ring(group)
        kv = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=lse.dtype)
        gradient: _Arriving | None = None  # of the keys and values at hand, from ranks that had them before
        for step in range(ring.size):
            arriving = ring.pass_on(kv) if step < ring.size - 1 else None
            blocks, causal = _ring_blocks(chunk_tokens, ring.rank, ring.source(step))
            part_dq, *part_dkv = attend_backward(dout, q, kv[0], kv[1], out, lse, blocks, causal)
            dq += part_dq
            dkv = torch.stack(part_dkv).to(lse.dtype)
            if gradient is not None:
                dkv += gradient.wait()
            if arriving is not None:
                kv = arriving.wait()
            gradient = ring.pass_on(dkv)  # the last time, home
        assert gradient is not None
        dk, dv = gradient.wait().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


@lru_cache(maxsize=256)
def _ring_blocks(chunk_tokens: tuple[int, ...], rank: int, source: int) -> tuple[tuple[Block, ...], bool]:
    """What this rank's queries see of `source`'s keys, and whether causally.

    A slice holds chunks r and 2·cp-1-r of each document. For s < r both query chunks see exactly chunk s of
    the source's two; for s > r the second query chunk sees both, the first none.
    """
    blocks, start = [], 0
    for chunk in chunk_tokens:
        middle, stop = start + chunk, start + 2 * chunk
        if source < rank:
            blocks.append(Block(start, stop, start, middle))
        elif source > rank:
            blocks.append(Block(middle, stop, start, stop))
        else:
            blocks.append(Block(start, stop, start, stop))
        start = stop
    return tuple(blocks), source == rank


class _Ring:
    """Neighbours in a ring of ranks; without a group, a ring of one."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def source(self, step: int) -> int:
        """The rank whose keys and values are here at this step."""
        return (self.rank - step) % self.size

    def pass_on(self, tensor: Tensor) -> _Arriving:
        """Starts sending to the next rank and receiving from the one before; `tensor` must not change until
        the wait."""
        if self.size == 1:
            return _Arriving(tensor, tensor, [])
        arriving = torch.empty_like(tensor)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = dist.P2POp(dist.isend, tensor, group=self.group, group_peer=after)
        receive = dist.P2POp(dist.irecv, arriving, group=self.group, group_peer=before)
        operations = [receive, send] if self.rank % 2 else [send, receive]
        return _Arriving(arriving, tensor, dist.batch_isend_irecv(operations))


class _Arriving:
    """A tensor on its way; keeps what was sent alive until both have happened."""

    def __init__(self, tensor: Tensor, sent: Tensor, works: list[Any]) -> None:
        self.tensor, self.sent, self.works = tensor, sent, works

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.tensor

"""Attention over rectangular blocks of a token stream, without ever holding the scores.

Everything else in this package that attends (packed documents, key/value caches, every context-parallel
exchange) is a list of `Block`s: queries `q_start:q_stop` see keys `k_start:k_stop`, either all of them or
causally with the two ends aligned. The kernels are the flash kernels that ship with PyTorch; what is here is
the bookkeeping that turns blocks into few kernel calls, and the algebra that lets partial results over
different keys be merged exactly (`merge`) and differentiated exactly (`attend_backward` takes the *final*
output and log-sum-exp, as ring attention needs: Liu et al. 2023, section 3; Dao 2023, section 3.1).

Cost: memory linear in tokens. Heads of grouped-query attention are never copied: the kernels broadcast them.
On CPU, half-precision inputs are computed in fp32 (more exact, and measured six times faster in the backward
than the bf16 kernel on a machine without bf16 instructions). Context parallelism and tensor parallelism are
invisible here: heads and tokens are whatever this rank holds.

Axes: T queries, S keys, N query heads, G key/value heads, D head dimension; B blocks run together, L tokens
of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Documents shorter than this are run together, padded to the longest of their batch. Measured on two cores
# (benchmarks/attention.py): above it one document fills the kernel and padding only costs.
BATCHED_BELOW_TOKENS = 512
# The shortest document of a batch is at least this share of the longest.
BATCHED_LENGTH_RATIO = 0.9


class Block(NamedTuple):
    """Queries `q_start:q_stop` attend to keys `k_start:k_stop`."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


def attend(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, blocks: tuple[Block, ...], causal: bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every block; scores are scaled by D ** -0.5.

    Blocks must not overlap, neither in queries nor in keys. `causal` aligns the ends: query i of a block with
    T queries and S >= T keys sees keys 0 … S-T+i.

    Returns:
        out_TND in q's dtype and lse_TN (fp32; fp64 for fp64 inputs), the natural log-sum-exp of the scaled
        scores. Queries of no block have output 0 and log-sum-exp -inf.
    """
    run = _attend_cuda if q_TND.is_cuda else _attend_cpu
    return run(q_TND, k_SGD, v_SGD, blocks, causal)


def attend_backward(
    dout_TND: Tensor,
    q_TND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    blocks: tuple[Block, ...],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq_TND, dk_SGD, dv_SGD) that flow through these blocks.

    `out_TND` and `lse_TN` are the final ones of each query, over all the keys it sees in this or any other
    call; the gradients of several calls over different keys then add up to the exact gradient.
    """
    run = _attend_backward_cuda if q_TND.is_cuda else _attend_backward_cpu
    return run(dout_TND, q_TND, k_SGD, v_SGD, out_TND, lse_TN, blocks, causal)


def block_forward(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` for one block of all queries and all keys."""
    return attend(q_TND, k_SGD, v_SGD, (Block(0, len(q_TND), 0, len(k_SGD)),), causal)


def merge(
    out_TND: Tensor, lse_TN: Tensor, other_out_TND: Tensor, other_lse_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """Combines attention of the same queries over two disjoint sets of keys; -inf marks an empty set.

    Computed and returned in the dtype of `lse_TN`, so that many merges do not round many times.
    """
    total_TN = torch.logaddexp(lse_TN, other_lse_TN)
    finite_TN = total_TN.masked_fill(total_TN == -torch.inf, 0.0)  # -inf minus -inf is nan
    weight_TN1 = torch.exp(lse_TN - finite_TN).unsqueeze(-1)
    other_weight_TN1 = torch.exp(other_lse_TN - finite_TN).unsqueeze(-1)
    return out_TND * weight_TN1 + other_out_TND * other_weight_TN1, total_TN


# --- CPU ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Blocks that one kernel call computes. Rows are slices for one block, else index tensors [B, L]."""

    q_rows: slice | Tensor
    k_rows: slice | Tensor
    causal: bool
    prefix: bool  # these queries were already given keys by an earlier batch of the same call
    valid_BL: Tensor | None  # False on padding; None where there is none


@lru_cache(maxsize=256)
def _batches(blocks: tuple[Block, ...], causal: bool) -> tuple[_Batch, ...]:
    """Groups blocks into kernel calls. The CPU kernel aligns a causal mask at the start, so a causal block
    with more keys than queries becomes a causal square and, before it, a full rectangle."""
    squares, rectangles, prefixes = [], [], []
    for block in blocks:
        num_queries, num_keys = block.q_stop - block.q_start, block.k_stop - block.k_start
        assert num_queries <= num_keys or not causal, f"{block} has fewer keys than queries"
        if not num_queries or not num_keys:
            continue
        if not causal or num_queries == 1:  # one query, the last: it sees every key
            rectangles.append(block)
            continue
        diagonal = block.k_stop - num_queries
        squares.append(block._replace(k_start=diagonal))
        if diagonal > block.k_start:
            prefixes.append(block._replace(k_stop=diagonal))
    groups = [(group, True, False) for group in _similar(squares, BATCHED_LENGTH_RATIO)]
    groups += [(group, False, False) for group in _similar(rectangles, 1.0)]
    groups += [(group, False, True) for group in _similar(prefixes, 1.0)]
    return tuple(_batch(group, causal, prefix) for group, causal, prefix in groups)


def _similar(blocks: list[Block], ratio: float) -> Iterator[list[Block]]:
    """Groups blocks of similar shape (equal shape for ratio 1), longest first; long ones stay alone."""

    def shape(block: Block) -> tuple[int, int]:
        return block.q_stop - block.q_start, block.k_stop - block.k_start

    group: list[Block] = []
    for block in sorted(blocks, key=shape, reverse=True):
        if group:
            longest = shape(group[0])
            alike = shape(block) == longest if ratio == 1.0 else shape(block)[0] >= ratio * longest[0]
            if not alike or max(longest) >= BATCHED_BELOW_TOKENS:
                yield group
                group = []
        group.append(block)
    if group:
        yield group


def _batch(group: list[Block], causal: bool, prefix: bool) -> _Batch:
    first = group[0]
    if len(group) == 1:
        return _Batch(
            slice(first.q_start, first.q_stop), slice(first.k_start, first.k_stop), causal, prefix, None
        )
    q_start, q_stop, k_start, k_stop = torch.tensor(group).T.unsqueeze(-1)
    # Padding repeats the last row: after the real rows, where a causal mask hides it from all of them.
    q_positions = q_start + torch.arange(first.q_stop - first.q_start)
    k_positions = k_start + torch.arange(first.k_stop - first.k_start)
    valid_BL = q_positions < q_stop
    return _Batch(
        q_positions.minimum(q_stop - 1),
        k_positions.minimum(k_stop - 1),
        causal,
        prefix,
        None if valid_BL.all() else valid_BL,
    )


def _take(tensor_TND: Tensor, rows: slice | Tensor) -> Tensor:
    """[B, N, L, D] (or [B, N, L]) in the dtype to compute in; a view for one block in full precision."""
    taken = tensor_TND[rows] if isinstance(rows, Tensor) else tensor_TND[rows].unsqueeze(0)
    return taken.to(_compute_dtype(taken)).transpose(1, 2)


def _put(target_TND: Tensor, rows: slice | Tensor, values_BNLD: Tensor, valid_BL: Tensor | None) -> None:
    values = values_BNLD.transpose(1, 2)
    if isinstance(rows, slice):
        target_TND[rows] = values[0].to(target_TND.dtype)
    elif valid_BL is None:
        target_TND[rows] = values.to(target_TND.dtype)
    else:
        target_TND[rows[valid_BL]] = values[valid_BL].to(target_TND.dtype)


def _scale(q_TND: Tensor) -> float:
    return q_TND.shape[-1] ** -0.5


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _attend_cpu(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, blocks: tuple[Block, ...], causal: bool
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(q_TND)
    out_TND = torch.zeros_like(q_TND, memory_format=torch.contiguous_format)
    lse_TN = torch.full(q_TND.shape[:2], -torch.inf, dtype=dtype)
    for batch in _batches(blocks, causal):
        out_BNLD, lse_BNL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _take(q_TND, batch.q_rows),
            _take(k_SGD, batch.k_rows),
            _take(v_SGD, batch.k_rows),
            is_causal=batch.causal,
            scale=_scale(q_TND),
        )
        if batch.prefix:
            out_BNLD, lse_BNL = merge(
                _take(out_TND, batch.q_rows), _take(lse_TN, batch.q_rows), out_BNLD, lse_BNL
            )
        _put(out_TND, batch.q_rows, out_BNLD, batch.valid_BL)
        _put(lse_TN, batch.q_rows, lse_BNL, batch.valid_BL)
    return out_TND, lse_TN


def _attend_backward_cpu(
    dout_TND: Tensor,
    q_TND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    blocks: tuple[Block, ...],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_TND, dk_SGD, dv_SGD = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_TND, k_SGD, v_SGD)
    )
    for batch in _batches(blocks, causal):
        dout_BNLD = _take(dout_TND, batch.q_rows)
        if batch.valid_BL is not None:  # padded queries see real keys, and must send them nothing
            dout_BNLD = dout_BNLD * batch.valid_BL[:, None, :, None]
        dq_BNLD, dk_BGLD, dv_BGLD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BNLD,
            _take(q_TND, batch.q_rows),
            _take(k_SGD, batch.k_rows),
            _take(v_SGD, batch.k_rows),
            _take(out_TND, batch.q_rows),
            _take(lse_TN, batch.q_rows),
            0.0,
            batch.causal,
            scale=_scale(q_TND),
        )
        if batch.prefix:
            dq_BNLD = dq_BNLD + _take(dq_TND, batch.q_rows)
        _put(dq_TND, batch.q_rows, dq_BNLD, batch.valid_BL)
        _put(dk_SGD, batch.k_rows, dk_BGLD, batch.valid_BL)
        _put(dv_SGD, batch.k_rows, dv_BGLD, batch.valid_BL)
    return dq_TND, dk_SGD, dv_SGD


# --- CUDA ---------------------------------------------------------------------------------------------------
# Flash Attention for blocks of any lengths in one call (the operator under torch.nn.attention.varlen; its
# causal mask is aligned at the end): version 2, on Hopper 3 where it is installed
# (runtime/flash_attention_3.py). Half precision, head dimension a multiple of 8. CPU tests cannot run it.


@dataclass(frozen=True)
class _Ragged:
    """The blocks one after another, as the kernel wants them."""

    q_rows: Tensor | slice
    k_rows: Tensor | slice
    cu_seqlens_q: Tensor  # int32 [B+1]
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int


# A micro-batch's layers ask one after another, each for four at most; rows are megabytes of the GPU at 512K tokens.
@lru_cache(maxsize=8)
def _ragged(blocks: tuple[Block, ...], device: torch.device) -> _Ragged:
    spans_q = [(b.q_start, b.q_stop) for b in blocks]
    spans_k = [(b.k_start, b.k_stop) for b in blocks]
    return _Ragged(
        _span_rows(spans_q, device),
        _span_rows(spans_k, device),
        _cumulative(spans_q, device),
        _cumulative(spans_k, device),
        max((stop - start for start, stop in spans_q), default=0),
        max((stop - start for start, stop in spans_k), default=0),
    )


def _span_rows(spans: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    if all(left[1] == right[0] for left, right in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1]) if spans else slice(0, 0)
    return torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device)


def _cumulative(spans: list[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(stop - start for start, stop in spans)], dtype=torch.int32).to(device)


def _attend_cuda(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, blocks: tuple[Block, ...], causal: bool
) -> tuple[Tensor, Tensor]:
    if len(blocks) == 1:
        return _attend_block_cuda(q_TND, k_SGD, v_SGD, blocks[0], causal)
    ragged = _ragged(blocks, q_TND.device)
    if not ragged.max_q or not ragged.max_k:
        return _nothing(q_TND)
    out, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
        q_TND[ragged.q_rows],
        k_SGD[ragged.k_rows],
        v_SGD[ragged.k_rows],
        ragged.cu_seqlens_q,
        ragged.cu_seqlens_k,
        ragged.max_q,
        ragged.max_k,
        0.0,
        causal,
        False,
        scale=_scale(q_TND),
    )
    return _spread(out, ragged.q_rows, len(q_TND)), _spread(lse_NT.T, ragged.q_rows, len(q_TND), -torch.inf)


def _attend_block_cuda(
    q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, block: Block, causal: bool
) -> tuple[Tensor, Tensor]:
    """One block, as a batch of one: there the kernel shares the keys out among the GPU's processors where queries
    are few (flash_api.cpp: set_params_splitkv). Decoding would otherwise keep busy one for each key/value head."""
    q_rows, k_rows = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
    q, k, v = q_TND[q_rows], k_SGD[k_rows], v_SGD[k_rows]
    if not len(q) or not len(k):
        return _nothing(q_TND)
    out, lse_1NT, *_ = torch.ops.aten._flash_attention_forward(
        *(x.unsqueeze(0) for x in (q, k, v)), None, None, len(q), len(k), 0.0, causal, False, scale=_scale(q)
    )
    return _spread(out[0], q_rows, len(q_TND)), _spread(lse_1NT[0].T, q_rows, len(q_TND), -torch.inf)


def _nothing(q_TND: Tensor) -> tuple[Tensor, Tensor]:
    """What queries without keys get."""
    lse_TN = q_TND.new_full(q_TND.shape[:2], -torch.inf, dtype=torch.float32)
    return torch.zeros_like(q_TND, memory_format=torch.contiguous_format), lse_TN


def _attend_backward_cuda(
    dout_TND: Tensor,
    q_TND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    blocks: tuple[Block, ...],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ragged = _ragged(blocks, q_TND.device)
    if not ragged.max_q or not ragged.max_k:
        return torch.zeros_like(q_TND), torch.zeros_like(k_SGD), torch.zeros_like(v_SGD)
    no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=q_TND.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout_TND[ragged.q_rows].contiguous(),
        q_TND[ragged.q_rows],
        k_SGD[ragged.k_rows],
        v_SGD[ragged.k_rows],
        out_TND[ragged.q_rows],
        lse_TN[ragged.q_rows].T.contiguous(),
        ragged.cu_seqlens_q,
        ragged.cu_seqlens_k,
        ragged.max_q,
        ragged.max_k,
        0.0,
        causal,
        no_dropout_state,
        torch.empty(0, dtype=torch.uint64, device=q_TND.device),
        scale=_scale(q_TND),
    )
    return (
        _spread(dq, ragged.q_rows, len(q_TND)),
        _spread(dk, ragged.k_rows, len(k_SGD)),
        _spread(dv, ragged.k_rows, len(v_SGD)),
    )


def _spread(part: Tensor, rows: Tensor | slice, num_rows: int, fill: float = 0.0) -> Tensor:
    """`part` at these rows and `fill` at all others; `part` itself where there are no others."""
    if isinstance(rows, slice) and len(part) == num_rows:
        return part
    whole = part.new_full((num_rows, *part.shape[1:]), fill)
    whole[rows] = part
    return whole

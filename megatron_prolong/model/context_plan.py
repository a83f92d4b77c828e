"""Which context-parallel rank holds which tokens of a packed sequence: pure, and the same on every rank.

Long documents are *split* over all ranks in Transformer Engine's thd layout: padded to a multiple of 2·cp and
cut into 2·cp chunks, of which rank r holds chunks r and 2·cp-1-r (zigzag: under a causal mask every pair
costs the same). Short documents stay *local*, whole on one rank, and need no exchange and no padding; which
rank is the caller's choice (data/balance). A rank slice is

    [ chunks of the split documents, in document order | local documents | padding to `multiple` ]

The split part has the same length on every rank; the local part need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prolong.deal import deal


class Span(NamedTuple):
    """Tokens start:stop of the packed sequence: one document."""

    start: int
    stop: int


@dataclass(frozen=True)
class ContextPlan:
    """The rank slices of one packed sequence. Made by `build`; hashable.

    Attributes:
        cp_size: number of context-parallel ranks.
        multiple: every slice length is a multiple of this (tp under sequence parallelism).
        num_tokens: tokens of the packed sequence (the end of its last document).
        split: documents cut over all ranks.
        local: for each rank, the documents that are whole on it.
    """

    cp_size: int
    multiple: int
    num_tokens: int
    split: tuple[Span, ...]
    local: tuple[tuple[Span, ...], ...]

    @classmethod
    def build(
        cls,
        cu_seqlens: Sequence[int],
        *,
        cp_size: int,
        multiple: int = 1,
        split_threshold_tokens: int = 0,
        owners: Sequence[int] = (),
    ) -> ContextPlan:
        """Plan for documents with these boundaries (document starts and the end of the last).

        Documents of at least `split_threshold_tokens` are split; 0 splits all, as Transformer Engine does.
        With one rank every document is local. `owners` are the ranks of the local documents, in their order;
        without, they are dealt out by tokens. Tokens behind the last document belong to no slice.
        """
        split: list[Span] = []
        whole: list[Span] = []
        for span in (Span(start, stop) for start, stop in pairwise(cu_seqlens) if stop > start):
            is_split = cp_size > 1 and span.stop - span.start >= split_threshold_tokens
            (split if is_split else whole).append(span)
        local: list[list[Span]] = [[] for _ in range(cp_size)]
        owners = owners or deal([span.stop - span.start for span in whole], cp_size).tolist()
        for span, owner in zip(whole, owners, strict=True):
            local[owner].append(span)
        return cls(cp_size, multiple, cu_seqlens[-1], tuple(split), tuple(map(tuple, local)))

    @property
    def chunk_tokens(self) -> tuple[int, ...]:
        """Tokens of a chunk of each split document; a rank holds two chunks of each."""
        return tuple(-(-(span.stop - span.start) // (2 * self.cp_size)) for span in self.split)

    @property
    def split_tokens(self) -> int:
        """Tokens of the split part of a slice, the same on every rank, padding included."""
        return 2 * sum(self.chunk_tokens)

    @property
    def cu_seqlens_padded(self) -> tuple[int, ...]:
        """Cumulative lengths of the split documents over all ranks, each padded to a multiple of 2·cp."""
        return (0, *accumulate(2 * self.cp_size * chunk for chunk in self.chunk_tokens))

    def local_cu_seqlens(self, rank: int) -> tuple[int, ...]:
        """Boundaries of `rank`'s local documents inside its slice; the first is `split_tokens`."""
        return tuple(
            accumulate((span.stop - span.start for span in self.local[rank]), initial=self.split_tokens)
        )

    def slice_length(self, rank: int) -> int:
        """Tokens of `rank`'s slice, at least one `multiple` even if it holds nothing but padding."""
        num_tokens = max(self.local_cu_seqlens(rank)[-1], 1)
        return -(-num_tokens // self.multiple) * self.multiple

    def take(self, tensor_T: Tensor, rank: int, pad_value: int | float) -> Tensor:
        """`rank`'s slice of a tensor over the packed sequence (CPU, tokens first), `pad_value` on padding."""
        rows = _rows(self, rank)
        taken = tensor_T.new_full((len(rows), *tensor_T.shape[1:]), pad_value)
        taken[rows >= 0] = tensor_T[rows[rows >= 0]]
        return taken


@lru_cache(maxsize=4)  # a pack's layers ask one after another; each is 4 MB of the GPU at 512K tokens
def zigzag_order(chunk_tokens: tuple[int, ...], num_ranks: int, device: torch.device) -> Tensor:
    """Rows that put the split parts of neighbouring ranks, one after another, into document order.

    For all ranks that is the order of the padded documents. For a run of `num_ranks` of them it is again a
    zigzag slice, of chunks `num_ranks` times as long: the layout of the ring between groups of ranks.
    """
    split_tokens, start, order = 2 * sum(chunk_tokens), 0, []
    for chunk in chunk_tokens:
        first = torch.arange(start, start + chunk)
        order += [rank * split_tokens + first for rank in range(num_ranks)]
        order += [rank * split_tokens + first + chunk for rank in reversed(range(num_ranks))]
        start += 2 * chunk
    return torch.cat(order).to(device)


@lru_cache(maxsize=32)
def _rows(plan: ContextPlan, rank: int) -> Tensor:
    """Row of the packed sequence for each row of the slice, -1 for padding; int64. Do not write into it."""
    rows = torch.full((plan.slice_length(rank),), -1)
    here = 0
    for span, chunk in zip(plan.split, plan.chunk_tokens, strict=True):
        for index in (rank, 2 * plan.cp_size - 1 - rank):
            start = min(span.start + index * chunk, span.stop)
            stop = min(start + chunk, span.stop)
            rows[here : here + stop - start] = torch.arange(start, stop)
            here += chunk
    for span in plan.local[rank]:
        rows[here : here + span.stop - span.start] = torch.arange(*span)
        here += span.stop - span.start
    return rows

"""Share a global batch's documents out over data-parallel ranks and micro-batches so that no rank waits.

Attention never crosses documents and the loss is averaged over the valid tokens of the global batch, so it does
not matter to the mathematics which rank trains on which document: the packed sequences only say which documents
(and cuts of documents) the batch consists of. Documents are never cut further.

1. Documents go to data-parallel ranks by modelled time, dearest first to the least loaded rank.
2. Each rank's documents go into micro-batches that fit in memory (micro_batches.py).
3. Each micro-batch gets the split threshold that makes it fastest on its context-parallel ranks (threshold.py).

Every rank computes the whole assignment from the lengths alone; it is a pure function, a few microseconds per
document. docs/balance.md has the literature and the measurements.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.balance.cost import CostModel, Lengths
from megatron_prolong.data.balance.micro_batches import Indices, fill_alike, fill_even, rank_tokens
from megatron_prolong.data.balance.threshold import Share, best_share, slice_tokens
from megatron_prolong.deal import deal
from megatron_prolong.errors import UserError


class DocumentIndex(NamedTuple):
    """A document of the global batch: its packed sequence in the batch, and its place in that sequence."""

    sample: int
    document: int


@dataclass(frozen=True)
class MicroBatchPlan:
    """The documents of one micro-batch, in the batch's order, and how they lie on the context-parallel ranks."""

    documents: tuple[DocumentIndex, ...]
    share: Share


EMPTY = MicroBatchPlan((), Share())
Assignment = tuple[tuple[MicroBatchPlan, ...], ...]
"""The micro-batches of every data-parallel rank, dearest micro-batch first."""


def assign(
    lengths: Sequence[Lengths],
    *,
    dp: int,
    cp: int,
    budget_tokens: int,
    cost: CostModel,
    equal_micro_batches: bool = False,
) -> Assignment:
    """Share the documents of a global batch out. Pure and deterministic; the same on every rank.

    Args:
        lengths: document lengths of each packed sequence of the global batch, int64 [D], all positive.
        budget_tokens: tokens of a micro-batch that one context-parallel rank has memory for.
        equal_micro_batches: every data-parallel rank gets the same number, of work as equal as memory allows;
            pipeline parallelism wants that. Otherwise documents of like length come together.

    Raises:
        UserError: a document does not fit in memory even when it is split.
    """
    flat = np.concatenate([np.asarray(sample, dtype=np.int64) for sample in lengths])
    _check_fits(flat, lengths, cp, budget_tokens)
    ranks = _deal_to_ranks(flat, dp, cp, budget_tokens, cost)
    if equal_micro_batches:
        filled = _equal_micro_batches(flat, ranks, cp, budget_tokens, cost)
    else:
        filled = [_micro_batches(flat[rank], rank, cp, budget_tokens, cost) for rank in ranks]
    samples, documents = _names(lengths)
    return tuple(_plans(rank, samples, documents) for rank in filled)


def _check_fits(flat: Lengths, lengths: Sequence[Lengths], cp: int, budget_tokens: int) -> None:
    tokens = slice_tokens(flat, cp)
    worst = int(tokens.argmax())
    if tokens[worst] <= budget_tokens:
        return
    sample, document = (int(names[worst]) for names in _names(lengths))
    raise UserError(
        f"packed sequence {sample} of the batch, document {document}: {flat[worst]} tokens are {tokens[worst]} "
        f"on each of {cp} context-parallel ranks, but a micro-batch may have {budget_tokens}; raise layout.cp"
    )


def _names(lengths: Sequence[Lengths]) -> tuple[Indices, Indices]:
    """Sample and place in the sample of every document of the batch, in order."""
    counts = [len(documents) for documents in lengths]
    return np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])


def _deal_to_ranks(flat: Lengths, dp: int, cp: int, budget_tokens: int, cost: CostModel) -> list[Indices]:
    """By modelled time. Documents beyond the budget must be split, so their exchange counts."""
    must_split = slice_tokens(flat, cp) * (cp > 1) * (flat > budget_tokens)
    seconds = cost.work(flat) / cp + cost.exchange * must_split * (cp - 1)
    owners = deal(seconds, dp)
    return [np.flatnonzero(owners == rank) for rank in range(dp)]


Filled = list[tuple[Indices, Share]]


def _micro_batches(lengths: Lengths, rank: Indices, cp: int, budget_tokens: int, cost: CostModel) -> Filled:
    """Micro-batches of like documents; if dealing them leaves a rank over its budget, with more room to spare."""
    for tokens in (rank_tokens(lengths, cp), slice_tokens(lengths, cp).astype(np.float64)):
        shares = [
            (rank[chosen], best_share(lengths[chosen], cp, budget_tokens, cost))
            for chosen in map(np.sort, fill_alike(tokens, lengths, budget_tokens))
        ]
        if all(share for _, share in shares):
            break
    return [(chosen, share) for chosen, share in shares if share] or [_empty()]


def _equal_micro_batches(
    flat: Lengths, ranks: list[Indices], cp: int, budget_tokens: int, cost: CostModel
) -> list[Filled]:
    """The smallest number of micro-batches with which every rank's documents fit."""
    tokens = slice_tokens(flat, cp).astype(np.float64)
    count = max(1, *(int(np.ceil(rank_tokens(flat[rank], cp).sum() / budget_tokens)) for rank in ranks))
    while True:
        dealt = _at_least(ranks, flat, count)
        for chosen_tokens in (rank_tokens(flat, cp), tokens):
            filled = [_even(flat, rank, chosen_tokens, cp, budget_tokens, cost, count) for rank in dealt]
            if all(rank is not None for rank in filled):
                return [rank for rank in filled if rank is not None]
        count += 1


def _even(
    flat: Lengths,
    rank: Indices,
    tokens: NDArray[np.float64],
    cp: int,
    budget_tokens: int,
    cost: CostModel,
    count: int,
) -> Filled | None:
    bins = fill_even(tokens[rank], cost.work(flat[rank]), budget_tokens, count)
    if bins is None:
        return None
    filled: Filled = []
    for chosen in map(np.sort, bins):
        if not len(chosen):
            filled.append(_empty())
            continue
        share = best_share(flat[rank[chosen]], cp, budget_tokens, cost)
        if share is None:
            return None
        filled.append((rank[chosen], share))
    return filled


def _at_least(ranks: list[Indices], flat: Lengths, count: int) -> list[Indices]:
    """Move shortest documents from ranks that have many to ranks that have fewer than `count`, if there are any."""
    hands = [rank[np.argsort(-flat[rank], kind="stable")].tolist() for rank in ranks]
    rich = [(-len(hand), rank) for rank, hand in enumerate(hands) if len(hand) > count]
    heapq.heapify(rich)
    for hand in hands:
        while len(hand) < count and rich:
            giver = hands[rich[0][1]]
            hand.append(giver.pop())
            if len(giver) > count:
                heapq.heapreplace(rich, (-len(giver), rich[0][1]))
            else:
                heapq.heappop(rich)
    return [np.sort(np.array(hand, dtype=np.int64)) for hand in hands]


def _empty() -> tuple[Indices, Share]:
    return np.array([], dtype=np.int64), Share()


def _plans(filled: Filled, samples: Indices, documents: Indices) -> tuple[MicroBatchPlan, ...]:
    plans = []
    for chosen, share in sorted(filled, key=lambda entry: -entry[1].seconds):
        named = map(DocumentIndex, samples[chosen].tolist(), documents[chosen].tolist())
        plans.append(MicroBatchPlan(tuple(named), share))
    return tuple(plans)

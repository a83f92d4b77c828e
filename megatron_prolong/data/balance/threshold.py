"""Which documents of a micro-batch are split over the context-parallel ranks, and how long the micro-batch takes.

Two kinds, as in model/context_plan.py: documents of at least the threshold are split over all cp ranks, evenly but
with an exchange; shorter ones stay whole on one rank, dealt by cost, without exchange but not always evenly.
The best threshold therefore depends on the company: eight documents of 64K stay local on eight ranks, five
among short ones had better be split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prolong.data.balance.cost import CostModel, Lengths
from megatron_prolong.deal import deal

_GOOD_ENOUGH = 0.002  # stop when no other threshold can save more than this share of the micro-batch's time
_MOST_CANDIDATES = 8
NEVER = 2**62  # a threshold no document reaches


@dataclass(frozen=True)
class Share:
    """How a micro-batch lies on its context-parallel ranks; by default one without documents.

    Attributes:
        split_threshold_tokens: documents of at least this many tokens are split.
        owners: the rank of each of the others, in their order.
        seconds: time of the slowest rank.
        max_tokens: tokens of the fullest rank, padding of split documents included.
    """

    split_threshold_tokens: int = NEVER
    owners: tuple[int, ...] = ()
    seconds: float = 0.0
    max_tokens: int = 0


def slice_tokens(lengths: Lengths, cp: int) -> Lengths:
    """Tokens of each document on every rank if it is split: padded to a multiple of 2·cp (int64 [D])."""
    return lengths if cp == 1 else 2 * -(-lengths // (2 * cp))


def best_share(lengths: Lengths, cp: int, budget_tokens: int, cost: CostModel) -> Share | None:
    """The fastest split threshold with which no rank holds more than `budget_tokens`; None if there is none."""
    best = None
    for threshold, bound in _candidates(np.sort(lengths)[::-1], cp, budget_tokens, cost):
        if best and bound > best.seconds * (1 - _GOOD_ENOUGH):
            break
        share = _share(lengths, threshold, cp, cost)
        if share.max_tokens <= budget_tokens and (best is None or share.seconds < best.seconds):
            best = share
    return best


def _candidates(ordered: Lengths, cp: int, budget_tokens: int, cost: CostModel) -> list[tuple[int, float]]:
    """Thresholds worth trying, with a lower bound of the time each can reach, most promising first.

    Splitting everything is always among them: it fits if anything does.
    """
    work = cost.work(ordered)
    if cp == 1:
        return [(NEVER, float(work.sum()))]
    # One candidate per different length: candidate i splits the num_split[i] longest documents.
    num_split = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1])
    before = num_split - 1
    split_work, split_length, split_tokens = (
        np.where(num_split > 0, np.cumsum(values)[before], 0)
        for values in (work, ordered, slice_tokens(ordered, cp))
    )
    bounds = (
        split_work / cp
        + cost.exchange_time(split_length, cp)
        + np.maximum(work[num_split], (work.sum() - split_work) / cp)
    )
    fullest = split_tokens + np.maximum(ordered[num_split], (ordered.sum() - split_length) / cp)
    order = np.argsort(bounds, kind="stable")
    order = order[fullest[order] <= budget_tokens][:_MOST_CANDIDATES]
    thresholds = np.where(num_split > 0, ordered[before], NEVER)
    all_split = float(work.sum() / cp + cost.exchange_time(ordered.sum(), cp))
    candidates = [(int(thresholds[i]), float(bounds[i])) for i in order]
    return sorted([*candidates, (int(ordered[-1]), all_split)], key=lambda candidate: candidate[1])


def _share(lengths: Lengths, threshold: int, cp: int, cost: CostModel) -> Share:
    is_split = lengths >= threshold
    split, whole = lengths[is_split], lengths[~is_split]
    work = cost.work(whole)
    owners = deal(work, cp)
    seconds, tokens = (np.bincount(owners, values, minlength=cp).max() for values in (work, whole))
    return Share(
        threshold,
        tuple(owners.tolist()),
        float(cost.work(split).sum() / cp + cost.exchange_time(split.sum(), cp) + seconds),
        int(slice_tokens(split, cp).sum() + tokens),
    )

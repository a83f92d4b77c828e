"""Which documents of a micro-batch are split over the context-parallel ranks, and how long the micro-batch takes.

Two kinds, as in model/context_plan.py, whose arithmetic is repeated here (tests hold the two together):
documents of at least the threshold are split over all cp ranks, evenly but with an exchange; shorter ones stay
whole on one rank, dealt by cost, dearest first to the least loaded, without exchange but not always evenly.
The best threshold therefore depends on the company: eight documents of 64K stay local on eight ranks, five
among short ones had better be split.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from megatron_prolong.data.balance.cost import CostModel, Lengths, Seconds

_GOOD_ENOUGH = 0.002  # stop when no other threshold can save more than this share of the micro-batch's time
_MOST_CANDIDATES = 8
NEVER = 2**62  # a threshold no document reaches


@dataclass(frozen=True)
class Share:
    """How a micro-batch lies on its context-parallel ranks.

    Attributes:
        split_threshold_tokens: documents of at least this many tokens are split.
        seconds: time of the slowest rank.
        work_seconds: work summed over the ranks, without exchange and waiting.
        exchange_seconds: time of the exchange, on every rank.
        max_tokens: tokens of the fullest rank, padding of split documents included.
    """

    split_threshold_tokens: int
    seconds: float
    work_seconds: float
    exchange_seconds: float
    max_tokens: int


def slice_tokens(lengths: Lengths, cp: int) -> Lengths:
    """Tokens of each document on every rank if it is split: padded to a multiple of 2·cp (int64 [D])."""
    return lengths if cp == 1 else 2 * -(-lengths // (2 * cp))


def best_share(lengths: Lengths, cp: int, budget_tokens: int, cost: CostModel) -> Share | None:
    """The fastest split threshold with which no rank holds more than `budget_tokens`; None if there is none."""
    ordered = np.sort(lengths)[::-1]
    work = cost.work(ordered)
    best = None
    for threshold, bound in _candidates(ordered, work, cp, budget_tokens, cost):
        if best and bound > best.seconds * (1 - _GOOD_ENOUGH):
            break
        share = _deal(ordered, work, threshold, cp, cost)
        if share.max_tokens <= budget_tokens and (best is None or share.seconds < best.seconds):
            best = share
    return best


def _candidates(
    ordered: Lengths, work: Seconds, cp: int, budget_tokens: int, cost: CostModel
) -> list[tuple[int, float]]:
    """Thresholds worth trying, with a lower bound of the time each can reach, most promising first.

    Splitting everything always fits if anything does and is the last resort.
    """
    if cp == 1:
        return [(NEVER, cost.fixed + float(work.sum()))]
    # One candidate per different length: candidate i splits the num_split[i] longest documents.
    num_split = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1])
    before = num_split - 1
    split_work, split_length, split_tokens = (
        np.where(num_split > 0, np.cumsum(values)[before], 0)
        for values in (work, ordered, slice_tokens(ordered, cp))
    )
    bounds = (
        cost.fixed
        + split_work / cp
        + cost.exchange_time(split_length, cp)
        + np.maximum(work[num_split], (work.sum() - split_work) / cp)
    )
    fullest = split_tokens + np.maximum(ordered[num_split], (ordered.sum() - split_length) / cp)
    order = np.argsort(bounds, kind="stable")
    order = order[fullest[order] <= budget_tokens][:_MOST_CANDIDATES]
    thresholds = np.where(num_split > 0, ordered[before], NEVER)
    all_split = cost.fixed + float(work.sum()) / cp + cost.exchange_time(ordered.sum(), cp)
    return [*((int(thresholds[i]), float(bounds[i])) for i in order), (int(ordered[-1]), float(all_split))]


def _deal(ordered: Lengths, work: np.ndarray, threshold: int, cp: int, cost: CostModel) -> Share:
    """Deal the documents (longest first) as ContextPlan does."""
    num_split = int(np.searchsorted(-ordered, -threshold, side="right")) if cp > 1 else 0
    split, local = ordered[:num_split], ordered[num_split:]
    split_tokens = int(slice_tokens(split, cp).sum())
    loads = [(0.0, rank) for rank in range(cp)]
    tokens = [0] * cp
    # In tokens rather than seconds, exactly as ContextPlan adds them up: no rounding may tell the two apart.
    costs = local * (1 + local / cost.equal_cost_tokens)
    for length, token_cost in zip(local.tolist(), costs.tolist(), strict=True):
        load, rank = loads[0]
        tokens[rank] += length
        heapq.heapreplace(loads, (load + token_cost, rank))
    exchange = cost.exchange_time(float(split.sum()), cp)
    return Share(
        split_threshold_tokens=threshold,
        seconds=cost.fixed + float(work[:num_split].sum()) / cp + exchange + max(loads)[0] * cost.linear,
        work_seconds=cost.fixed * cp + float(work.sum()),
        exchange_seconds=exchange,
        max_tokens=split_tokens + max(tokens),
    )

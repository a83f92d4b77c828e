"""The ways to share out a global batch that are compared, each reduced to how long the ranks work and wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.balance import Assignment, CostModel, assign
from megatron_prolong.data.balance.cost import Lengths


@dataclass(frozen=True)
class Outcome:
    """One step: seconds until the slowest rank is done, and mean seconds a rank is at work (exchange included)."""

    seconds: float
    busy_seconds: float

    @property
    def balance(self) -> float:
        return self.busy_seconds / self.seconds


def in_order(batch: Sequence[Lengths], dp: int, cp: int, cost: CostModel, *, sync: str) -> Outcome | None:
    """Whole sequences, rank r trains on r, r + dp, …, every document split over all cp ranks. None if too few.

    sync: "step" if ranks wait for each other once per step (gradients kept per rank until then: DDP, ZeRO-1),
    "micro_batch" if at every micro-batch (FSDP full shard gathers weights together).
    """
    return _outcome(_sequence_seconds(batch, dp, cp, cost), sync)


def prolong_sort(batch: Sequence[Lengths], dp: int, cp: int, cost: CostModel, *, sync: str) -> Outcome | None:
    """The same, each rank's sequences of a step sorted by Σ len², longest first (ProLong training/dataset.py)."""
    seconds = _sequence_seconds(batch, dp, cp, cost)
    # Time grows with Σ len² alone: all sequences have the same number of tokens.
    return _outcome(None if seconds is None else -np.sort(-seconds, axis=1), sync)


def ours(
    batch: Sequence[Lengths], dp: int, cp: int, cost: CostModel, budget_tokens: int, *, equal: bool = False
) -> Outcome:
    assignment = assign(
        batch, dp=dp, cp=cp, budget_tokens=budget_tokens, cost=cost, equal_micro_batches=equal
    )
    return outcome_of(assignment, batch, cp, cost)


def outcome_of(assignment: Assignment, batch: Sequence[Lengths], cp: int, cost: CostModel) -> Outcome:
    exchanged = sum(
        float(batch[sample][document])
        for plans in assignment
        for plan in plans
        for sample, document in plan.documents
        if batch[sample][document] >= plan.share.split_threshold_tokens
    )
    busy = cost.work(np.concatenate(batch)).sum() / cp + cost.exchange_time(exchanged, cp)
    slowest = max(sum(plan.share.seconds for plan in plans) for plans in assignment)
    return Outcome(slowest, float(busy) / len(assignment))


def megatron_hybrid_cp(
    batch: Sequence[Lengths], ranks: int, cost: CostModel, budget_tokens: int
) -> Outcome | None:
    """Megatron-Core 0.16's hybrid context parallelism: groups of 1, 2, 4, … ranks per document, over all ranks.

    Its scheduler, called as it is, judged by our cost model. A document runs alone on as many ranks as its
    tokens need; ranks wait for each other after each of its groups. None where the scheduler fails.
    """
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    class Group:
        def size(self) -> int:
            return ranks

    flat = np.concatenate(batch)
    try:
        _, groups = BalancedCPScheduler(budget_tokens, Group()).get_groups_and_subsamples(
            list(enumerate(flat.tolist())), None
        )
    except (AssertionError, IndexError, ValueError, UnboundLocalError):
        return None
    work, seconds, busy = cost.work(flat), 0.0, 0.0
    for by_rank in groups:
        degree = np.bincount(np.concatenate([np.array(ids, dtype=np.int64) for ids in by_rank]), minlength=1)
        times = [
            sum(work[i] / degree[i] + cost.exchange_time(float(flat[i]), int(degree[i])) for i in ids)
            for ids in by_rank
        ]
        seconds += max(times)
        busy += sum(times) / ranks
    return Outcome(seconds, busy)


def best_possible(batch: Sequence[Lengths], dp: int, cost: CostModel) -> float:
    """Upper bound of mean/max when documents are not cut over data-parallel ranks: lower bounds of the maximum.

    Some rank gets j+1 of the j·dp+1 dearest documents, so at least the j+1 cheapest of those.
    """
    work = np.sort(cost.work(np.concatenate(batch)))[::-1]
    mean = float(work.sum()) / dp
    sums = np.concatenate([[0.0], np.cumsum(work)])
    most = max(mean, float(work[0]))
    for j in range(1, (len(work) - 1) // dp + 1):
        end = j * dp + 1
        most = max(most, float(sums[end] - sums[end - j - 1]))
    return mean / most


def no_exchange_beyond_need(
    batch: Sequence[Lengths], ranks: int, cost: CostModel, budget_tokens: int
) -> float:
    """Lower bound of a step's seconds for any context-parallel degree per document (powers of two).

    Perfect balance, and every document on no more ranks than its tokens need.
    """
    flat = np.concatenate(batch)
    degree = 2.0 ** np.ceil(np.log2(np.maximum(flat / budget_tokens, 1)))
    return float((cost.work(flat) + cost.exchange * flat * (degree - 1)).sum()) / ranks


def _sequence_seconds(
    batch: Sequence[Lengths], dp: int, cp: int, cost: CostModel
) -> NDArray[np.float64] | None:
    """[dp, micro-batches]"""
    if len(batch) % dp:
        return None
    seconds = [cost.work(d).sum() / cp + cost.exchange_time(float(d.sum()), cp) for d in batch]
    return np.array(seconds).reshape(-1, dp).T


def _outcome(seconds: NDArray[np.float64] | None, sync: str) -> Outcome | None:
    if seconds is None:
        return None
    slowest = seconds.sum(axis=1).max() if sync == "step" else seconds.max(axis=0).sum()
    return Outcome(float(slowest), float(seconds.sum(axis=1).mean()))

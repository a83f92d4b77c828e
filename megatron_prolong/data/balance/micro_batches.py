"""Fill one data-parallel rank's documents into micro-batches that fit in memory."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.balance.cost import Lengths
from megatron_prolong.data.balance.threshold import slice_tokens

Indices = NDArray[np.int64]
# Documents too short to be split well are local; dealing them leaves the fullest rank this much above the mean.
_UNEVEN = 1.03


def rank_tokens(lengths: Lengths, cp: int) -> NDArray[np.float64]:
    """Tokens that each document takes of a rank's budget, on average over the ranks."""
    return np.minimum(slice_tokens(lengths, cp), lengths * _UNEVEN / cp)


def fill_alike(tokens: NDArray[np.float64], lengths: Lengths, budget_tokens: int) -> list[Indices]:
    """As few micro-batches as first-fit finds, of documents of like length: least exchange, least waiting.

    Args:
        tokens: what each document takes of the budget.

    Returns:
        document indices of each micro-batch, the longest documents first.
    """
    left = np.argsort(-lengths, kind="stable")  # what is not placed yet, longest first
    micro_batches = []
    while len(left):
        # The micro-batch takes, longest first, whatever still fits: runs of neighbours, found by bisection.
        need = tokens[left]
        total = np.concatenate([[0.0], np.cumsum(need)])
        room, start = float(budget_tokens), 0
        taken = np.zeros(len(left), dtype=bool)
        while (start := start + int(np.searchsorted(-need[start:], -room))) < len(left):
            stop = max(int(np.searchsorted(total, total[start] + room, side="right")) - 1, start + 1)
            taken[start:stop] = True
            room -= total[stop] - total[start]
            start = stop
        micro_batches.append(left[taken])
        left = left[~taken]
    return micro_batches


def fill_even(
    tokens: NDArray[np.float64], work: NDArray[np.float64], budget_tokens: int, count: int
) -> list[Indices] | None:
    """Exactly `count` micro-batches of work as equal as memory allows, for pipelines; None if they do not fit.

    Dearest document first, into the micro-batch with the least work that has room.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [float(budget_tokens)] * count
    loads = [(0.0, number) for number in range(count)]
    for index in np.argsort(-work, kind="stable").tolist():
        too_full = []
        while loads and room[loads[0][1]] < tokens[index]:
            too_full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, number = loads[0]
        heapq.heapreplace(loads, (load + float(work[index]), number))
        bins[number].append(index)
        room[number] -= float(tokens[index])
        for entry in too_full:
            heapq.heappush(loads, entry)
    return [np.array(chosen, dtype=np.int64) for chosen in bins]

"""Deal out things of different cost so that all hands end up with about as much."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray


def deal(costs: ArrayLike, hands: int) -> NDArray[np.int64]:
    """The hand that gets each thing: dearest first, each to the hand with the least so far (of equals, the first).

    Longest-processing-time-first: the fullest hand is within 4/3 of the best possible (Graham 1969).
    """
    costs = np.asarray(costs, np.float64)
    order = np.argsort(-costs, kind="stable")
    loads = [(0.0, hand) for hand in range(hands)]
    owners = []
    for cost in costs[order].tolist():
        load, hand = loads[0]
        owners.append(hand)
        heapq.heapreplace(loads, (load + cost, hand))
    dealt = np.empty(len(costs), np.int64)
    dealt[order] = owners
    return dealt

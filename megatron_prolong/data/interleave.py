"""Which domain fills which slot of a run, so that every prefix keeps the proportions within one sample.

This is the chairman assignment problem: serve k states with shares p_1 … p_k so that after any number of
slots n state i has held the chair n·p_i times, up to less than one. Tijdeman's rule ("The chairman
assignment problem", 1980) does it with a deviation of at most 1 − 1/(2k−2): of the states that are behind
by at least 1/(2k−2), the one whose deadline comes first. It needs no knowledge of the run's length, so a
longer run begins as the shorter one did. Shares are exact fractions, hence after their common denominator
L all states are even again and the schedule repeats: at most L slots are ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray


class Interleave:
    """The domain of every slot, and how many slots of that domain came before: both O(1).

    proportions: positive, one per domain; used relative to their sum, as the decimals they are written as.
    num_slots: length of the run. Costs min(num_slots, L) steps of plain Python once (about 1 µs per domain).
    """

    def __init__(self, proportions: Sequence[float], num_slots: int) -> None:
        shares = [Fraction(str(proportion)) for proportion in proportions]
        total = sum(shares)
        shares = [share / total for share in shares]
        period = lcm(*(share.denominator for share in shares))
        self.shares = shares
        self.num_slots = num_slots
        self._weights = [int(share * period) for share in shares]
        self._period = period
        self._domains = _chairmen(self._weights, period, min(period, num_slots))
        self._ordinals = np.zeros(len(self._domains), np.int64)
        for domain in range(len(shares)):
            slots = np.flatnonzero(self._domains == domain)
            self._ordinals[slots] = np.arange(len(slots))

    def __getitem__(self, slot: int) -> tuple[int, int]:
        """(domain, number of earlier slots of that domain)."""
        assert 0 <= slot < self.num_slots
        rounds, rest = divmod(slot, self._period)
        domain = int(self._domains[rest])
        return domain, rounds * self._weights[domain] + int(self._ordinals[rest])

    def count(self, domain: int, num_slots: int) -> int:
        """How many of the first num_slots slots belong to the domain."""
        rounds, rest = divmod(num_slots, self._period)
        return rounds * self._weights[domain] + int((self._domains[:rest] == domain).sum())


def _chairmen(weights: Sequence[int], period: int, num_slots: int) -> NDArray[np.int16]:
    """Tijdeman's rule in integers: domain of each of the first num_slots slots, shares weights/period."""
    domains = np.zeros(num_slots, np.int16)
    if len(weights) == 1:
        return domains
    scale = 2 * len(weights) - 2
    behind = [0] * len(weights)  # scale·period·(n·p_i − slots served)
    unit = scale * period
    for slot in range(num_slots):
        best, best_deadline = -1, (0, 1)
        for domain, weight in enumerate(weights):
            behind[domain] += scale * weight
            if behind[domain] < period:
                continue
            # It is too far behind in (unit − period − behind) / (scale·weight) slots; compared exactly.
            deadline = (unit - period - behind[domain], weight)
            if best < 0 or deadline[0] * best_deadline[1] < best_deadline[0] * deadline[1]:
                best, best_deadline = domain, deadline
        domains[slot] = best
        behind[best] -= unit
    return domains

"""Confidence intervals by resampling questions.

Rows that ask the same question (the gold passage at another depth) are not independent, so whole questions are
drawn, never single rows.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
SEED = 42


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, whose ends are NaN where one question is all there is."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], questions: Sequence[Hashable]) -> Interval:
    """Mean over rows, interval over questions; rows of NaN do not count, and not all may be."""
    sums, counts = _by_question(values, questions)
    draws = np.random.default_rng(SEED).integers(0, len(sums), size=(DRAWS, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(sums) > 1 else (np.nan, np.nan)
    return Interval(float(np.sum(sums) / np.sum(counts)), float(low), float(high))


def difference_interval(
    before: Sequence[float], after: Sequence[float], questions: Sequence[Hashable]
) -> Interval | None:
    """Paired difference of two models on the same rows, after − before; None without a row that both have."""
    differences = [late - early for early, late in zip(before, after, strict=True)]
    return None if all(map(math.isnan, differences)) else mean_interval(differences, questions)


def _by_question(
    values: Sequence[float], questions: Sequence[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    number: dict[Hashable, int] = {}
    known = [pair for pair in zip(values, questions, strict=True) if not math.isnan(pair[0])]
    places = np.array([number.setdefault(question, len(number)) for _, question in known])
    sums = np.bincount(places, weights=np.array([value for value, _ in known], dtype=np.float64))
    return sums.astype(np.float64), np.bincount(places).astype(np.float64)

"""A cost model fitted to measured micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.balance.cost import Lengths


def fit(lengths: Sequence[Lengths], seconds: Sequence[float]) -> tuple[CostModel, float]:
    """The model closest to measured micro-batches on one rank (relative error, least squares), and the seconds
    that every micro-batch takes beside.

    Args:
        lengths: document lengths of each measured micro-batch, at least three that differ in Σ n and Σ n².
        seconds: how long each took. The exchange cannot be seen on one rank and is 0.

    A term whose coefficient would be negative (noise) is left out.
    """
    measured = np.asarray(seconds, dtype=np.float64)
    terms = np.array([[d.sum(), np.square(d, dtype=np.float64).sum(), 1.0] for d in lengths])
    terms /= measured[:, None]  # relative error: a long micro-batch must not drown the short ones
    scale = terms.max(axis=0)
    kept = [0, 1, 2]
    while True:
        solution = np.linalg.lstsq(terms[:, kept] / scale[kept], np.ones(len(measured)), rcond=None)[0]
        negative = [term for term, value in zip(kept, solution, strict=True) if value < 0 and term != 0]
        if not negative:
            break
        kept.remove(negative[-1])
    found = dict(zip(kept, solution / scale[kept], strict=True))
    return CostModel(linear=found[0], quadratic=found.get(1, 0.0)), found.get(2, 0.0)

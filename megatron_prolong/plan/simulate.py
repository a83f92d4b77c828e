"""Play the batches of a mixture through a layout: how steps differ, and how long ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.time import rank_loads, sequence_time, step_time


@dataclass(frozen=True)
class Simulation:
    """A layout over real batches.

    Attributes:
        seconds: of every step, sequences given to ranks by cost; [steps].
        utilisation: mean over maximal load of the data-parallel ranks, by cost.
        utilisation_as_drawn: the same when sequences are dealt out in the order drawn.
    """

    seconds: NDArray[np.float64]
    utilisation: float
    utilisation_as_drawn: float

    def percentiles(self) -> dict[str, float]:
        """Seconds of the median, the slowest tenth and the slowest step."""
        median, tenth = np.percentile(self.seconds, [50, 90])
        return {"median": float(median), "p90": float(tenth), "max": float(self.seconds.max())}


def simulate(job: Job, gpu: Gpu, pairs: NDArray[np.float64]) -> Simulation:
    """Play `pairs` (Σ len² of each sequence, [steps, sequences]) through `job`."""
    one = sequence_time(job, gpu)
    by_cost = [rank_loads(one.seconds(step), job.dp, True) for step in pairs]
    as_drawn = [rank_loads(one.seconds(step), job.dp, False) for step in pairs]
    return Simulation(
        seconds=np.array([step_time(job, gpu, step[None]).total for step in pairs]),
        utilisation=_utilisation(by_cost),
        utilisation_as_drawn=_utilisation(as_drawn),
    )


def _utilisation(loads: list[NDArray[np.float64]]) -> float:
    """Useful share of the ranks' time: Σ mean / Σ max over the steps."""
    return float(sum(load.mean() for load in loads) / sum(load.max() for load in loads))

"""Play the batches of a mixture through a layout: how steps differ, and how long ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_prolong.plan.batches import Batches
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.time import RankLoads, Seconds, rates, step_time


@dataclass(frozen=True)
class Simulation:
    """A layout over a mixture's batches.

    Attributes:
        seconds: of every step, [steps].
        utilisation: mean over maximal load of the data-parallel ranks, documents dealt out by cost.
        utilisation_as_drawn: the same when whole packed sequences are dealt out in the order drawn.
    """

    seconds: Seconds
    utilisation: float
    utilisation_as_drawn: float

    def percentiles(self) -> dict[str, float]:
        """Seconds of the median, the slowest tenth and the slowest step."""
        median, tenth = np.percentile(self.seconds, [50, 90])
        return {"median": float(median), "p90": float(tenth), "max": float(self.seconds.max())}


def simulate(job: Job, gpu: Gpu, batches: Batches) -> Simulation:
    """Play all of `batches` through `job`."""
    one, documents = rates(job, gpu), batches.documents
    by_cost = [RankLoads.of(one, batch, job.dp) for batch in documents]
    as_drawn = []
    for step in batches.lengths:
        sequences = np.array([one.seconds(lengths).sum() for lengths in step])
        as_drawn.append(np.array([sequences[rank :: job.dp].sum() for rank in range(job.dp)]))
    return Simulation(
        seconds=np.array([step_time(job, gpu, [batch]).total for batch in documents]),
        utilisation=sum(load.mean for load in by_cost) / sum(load.slowest for load in by_cost),
        utilisation_as_drawn=float(
            sum(load.mean() for load in as_drawn) / sum(load.max() for load in as_drawn)
        ),
    )

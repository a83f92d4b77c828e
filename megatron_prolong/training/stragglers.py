"""Which ranks the others wait for: a hot GPU, a bad link or a busy host slows a whole job, and no loss shows it.

Each rank times its own part of a step, up to where it waits for the others' gradients. Ranks of one replica of the
model wait for each other before that, so often only the node is found, not the GPU.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.runtime.launch import World

WINDOW = 20  # steps: a single slow one has other reasons
SLOW = 1.15  # times the time that the work asks for, which is known within a few percent


@dataclass(frozen=True)
class Place:
    """A rank's host, data-parallel replica and pipeline stage."""

    host: str
    replica: int
    stage: int


@dataclass
class Stragglers:
    """What the main rank knows of the ranks' times.

    Attributes:
        places: of every rank, on the main rank; nowhere else, and not for a single rank.
        balance: mean over the ranks of their time over that of the slowest of their pipeline stage, in the latest
            step: 1 where none waits. None elsewhere.
    """

    places: list[Place]
    balance: float | None = None
    _recent: deque[NDArray[np.float64]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _told: set[int] = field(default_factory=set)

    @classmethod
    def meet(cls, world: World, groups: ParallelGroups) -> Stragglers:
        """Collective."""
        own = Place(platform.node(), groups.dp.rank, groups.pp.rank)
        places: list[Place] = [own] * world.size
        dist.gather_object(own, places if world.is_main else None)
        return cls(places if world.is_main and world.size > 1 else [])

    def note(self, times: Sequence[float], costs: Sequence[float]) -> None:
        """Take a step in.

        Args:
            times: how long each rank was at it, in seconds.
            costs: what the step's documents were planned to cost each replica, in any unit.
        """
        if not self.places:
            return
        seconds, planned = np.asarray(times), np.asarray(costs)
        stages = np.array([place.stage for place in self.places])
        work = planned[[place.replica for place in self.places]]
        comparable = work >= work.max() / 2  # with little to do, fixed costs are most of the time
        pace, shares = np.ones_like(seconds), np.ones_like(seconds)
        for stage in np.unique(stages):  # stages have different work, and are at a step for different times
            peers = stages == stage
            shares[peers] = seconds[peers] / seconds[peers].max()
            peers &= comparable
            pace[peers] = seconds[peers] / work[peers]
            pace[peers] /= np.median(pace[peers])
        self.balance = float(shares.mean())
        self._recent.append(pace)

    def news(self) -> dict[int, float]:
        """Ranks found slow since the last call, and how many times longer than the others they take. One that has
        recovered may be found again."""
        if len(self._recent) < WINDOW:
            return {}
        usual = np.median(self._recent, axis=0)
        found = {rank: float(usual[rank]) for rank in np.flatnonzero(usual > SLOW).tolist()}
        # Not where it is near SLOW: it would be told again and again.
        self._told -= set(np.flatnonzero(usual < (1 + SLOW) / 2).tolist())
        new = {rank: times for rank, times in found.items() if rank not in self._told}
        self._told.update(new)
        return new

    def describe(self, slow: dict[int, float]) -> str:
        """In words."""
        hosts: dict[str, list[int]] = {}
        for rank in slow:
            hosts.setdefault(self.places[rank].host, []).append(rank)
        who = "; ".join(f"{host}: rank {', '.join(map(str, ranks))}" for host, ranks in hosts.items())
        return (
            f"all wait for slow ranks, {max(slow.values()):.2f} times the others' time for the same work in the "
            f"last {WINDOW} steps ({who}): a hot or damaged GPU, a bad link, or a busy host; `prolong doctor` there"
        )

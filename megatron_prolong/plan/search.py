"""Every layout of a stage on a cluster: which are valid, which fit, how fast they are, and why others not.

The rules are the ones a run is checked against (recipe/layout_rules.py, recipe/fp8.py), and those that the hardware
sets. A layout is a point (tp, pp, virtual_pp, cp, exchange, recompute); all sizes are powers of two; the search is
exhaustive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import BatchDocuments
from megatron_prolong.plan.memory import RankMemory, parked_bytes, peak_memory
from megatron_prolong.plan.time import StepTime, mfu, step_time, tokens_per_second_per_gpu
from megatron_prolong.recipe.fp8 import fp8_problem
from megatron_prolong.recipe.layout_rules import layout_problems
from megatron_prolong.recipe.schema import CpExchange, Recompute

RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", "all_but_attention", "full")
EXCHANGES: tuple[CpExchange, ...] = ("all_gather", "p2p", "a2a")
ONLY_RANK: tuple[CpExchange, ...] = ("p2p",)

# Above this share of a GPU's memory a plan is marked: what a real allocator needs beyond it is unmeasured.
ROOMY = 0.95
# A layout this near to another's speed is as good, if it has something else to offer.
AS_FAST = 0.9


@dataclass(frozen=True)
class Candidate:
    """One layout with its prediction.

    Attributes:
        job: the stage at this layout.
        memory: of the fullest rank; None when the layout is invalid.
        needed_bytes: GPU memory with fragmentation and reserve.
        tight: it runs, but the prediction leaves less than 5% of the GPU's memory.
        time: of a step; None when it does not run.
        throughput: tokens per second and GPU.
        mfu: document-aware model FLOPs over the peak.
        reason: why it does not run; empty when it does.
    """

    job: Job
    memory: RankMemory | None = None
    needed_bytes: float = 0.0
    tight: bool = False
    time: StepTime | None = None
    throughput: float = 0.0
    mfu: float = 0.0
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether the layout is valid and fits."""
        return not self.reason

    @property
    def name(self) -> str:
        """Short description, such as tp4 pp2 cp2 dp4 p2p full."""
        layout = self.job.layout
        pipeline = f"pp{layout.pp}" + (f"v{layout.virtual_pp}" if layout.virtual_pp > 1 else "")
        exchange = f" {layout.cp_exchange}" if layout.cp > 1 else ""
        dp = f"dp{self.job.dp}"
        return f"tp{layout.tp} {pipeline} cp{layout.cp} {dp}{exchange}, recompute {self.job.recompute}"

    def gpu_hours(self, num_steps: int) -> float:
        """GPU-hours of a stage of that many steps."""
        assert self.time is not None, "only a layout that runs has a time"
        return self.time.total * num_steps * self.job.world_size / 3600


def evaluate(job: Job, gpu: Gpu, batches: Sequence[BatchDocuments]) -> Candidate:
    """Predict one layout over some global batches."""
    if reason := invalid(job, gpu):
        return Candidate(job, reason=reason)
    memory = peak_memory(job)
    needed = gpu.needed_bytes(memory)
    if not gpu.fits(memory):
        return Candidate(job, memory, needed, reason=_out_of_memory(memory, needed, gpu))
    parked = max(parked_bytes(job, rank) for rank in range(job.layout.pp))
    if parked > (room := gpu.parkable_bytes(job.world_size)):
        reason = f"out of host memory: parks {parked / 1e9:.0f} GB for each GPU, of {room / 1e9:.0f}"
        return Candidate(job, reason=reason)
    time = step_time(job, gpu, batches)
    return Candidate(
        job,
        memory,
        needed,
        tight=needed > ROOMY * gpu.memory_bytes,
        time=time,
        throughput=tokens_per_second_per_gpu(job, time),
        mfu=mfu(job, gpu, time, batches),
    )


def _out_of_memory(memory: RankMemory, needed: float, gpu: Gpu) -> str:
    largest = max(memory.parts(), key=lambda part: memory.parts()[part])
    needs, has = math.ceil(needed / 1e8) / 10, math.floor(gpu.memory_bytes / 1e8) / 10  # never equal
    return (
        f"out of memory: needs {needs} GB of {has} (most: {largest} {memory.parts()[largest] / 1e9:.1f} GB)"
    )


def search(job: Job, gpu: Gpu, batches: Sequence[BatchDocuments]) -> list[Candidate]:
    """Every layout of `job`, fastest first, then those that fail; what is not searched is as in its own.

    Of equally fast ones that with the smallest copies of the model is first, and then that of least memory.
    """
    candidates = [evaluate(option, gpu, batches) for option in layouts(job, gpu)]
    return sorted(
        candidates, key=lambda c: (not c.runs, -c.throughput, c.job.layout.model_ranks, c.needed_bytes)
    )


def best_of(ranking: Sequence[Candidate]) -> Candidate | None:
    """The layout to run: the fastest, but not a tight one if another with more room is nearly as fast."""
    running = [candidate for candidate in ranking if candidate.runs]
    roomy = [c for c in running if not c.tight and c.throughput >= AS_FAST * running[0].throughput]
    return next(iter(roomy or running), None)


def layouts(job: Job, gpu: Gpu) -> Iterator[Job]:
    """All points of the search space, valid or not, without those that only differ where it cannot matter."""
    world, num_layers = job.world_size, job.shape.num_layers
    evenly = {"first_stage_layers": None, "last_stage_layers": None}
    for tp in _powers(min(world, 2 * gpu.gpus_per_node)):
        for pp in _powers(min(world // tp, num_layers)):
            for cp in _powers(world // (tp * pp)):
                exchanges = EXCHANGES if cp > 1 else ONLY_RANK
                for virtual_pp, exchange in product(_chunkings(num_layers, pp), exchanges):
                    point = {"tp": tp, "pp": pp, "virtual_pp": virtual_pp, "cp": cp, "cp_exchange": exchange}
                    layout = job.layout.model_copy(update={**evenly, **point})
                    for mode in RECOMPUTE_MODES:
                        yield replace(job, layout=layout, recompute=mode)


def invalid(job: Job, gpu: Gpu) -> str:
    """Why the layout cannot run at all, or an empty string. Memory is judged elsewhere."""
    layout = job.layout
    if job.precision == "fp32":
        return "precision: fp32 runs on CPU only; use bf16"
    if job.precision == "fp8" and (problem := fp8_problem(job.fp8_recipe, gpu.compute_capability, layout.cp)):
        return problem
    problems = layout_problems(layout, job.shape, job.world_size, job.precision)
    if problems:
        return f"{problems[0].field}: {problems[0].rule}"
    if layout.tp > gpu.gpus_per_node:
        return f"tp: {layout.tp} ranks leave the node of {gpu.gpus_per_node} GPUs, at the network's speed"
    return ""


def frontier(candidates: list[Candidate]) -> list[Candidate]:
    """The layouts that no other one beats in both memory and throughput, by memory."""
    best: list[Candidate] = []
    for candidate in sorted((c for c in candidates if c.runs), key=lambda c: (c.needed_bytes, -c.throughput)):
        if not best or candidate.throughput > best[-1].throughput:
            best.append(candidate)
    return best


def _chunkings(num_layers: int, pp: int) -> list[int]:
    """Values of virtual_pp that cut the layers evenly; 1 always, so that a bad pp is reported."""
    return [1] + [v for v in _powers(num_layers // pp)[1:] if pp > 1 and num_layers % (pp * v) == 0]


def _powers(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << exponent for exponent in range(max(most, 1).bit_length())]

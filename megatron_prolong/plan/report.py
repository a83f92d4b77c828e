"""The plan of a recipe on a cluster: computed once, then printed, drawn (page.py) or written into a recipe."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prolong.plan.batches import Batches, stage_batches
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job, job_of
from megatron_prolong.plan.search import Candidate, evaluate, search
from megatron_prolong.plan.simulate import Simulation, simulate
from megatron_prolong.plan.volume import step_volume
from megatron_prolong.recipe.schema import LayoutOverride, Recipe, Stage
from megatron_prolong.recipe.shape import ModelShape

SAMPLED_STEPS = 16
KERNELS = {
    "te": "Transformer Engine",
    "flash2": "PyTorch's FlashAttention-2 (--te plans with Transformer Engine)",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage on a cluster.

    Attributes:
        stage: as the recipe has it.
        batches: the document lengths the prediction used.
        written: the layout that the recipe has, judged.
        candidates: every layout, fastest first, then those that do not run.
        simulation: of the best layout, when asked for.
    """

    stage: Stage
    batches: Batches
    written: Candidate
    candidates: list[Candidate]
    simulation: Simulation | None = None

    @property
    def best(self) -> Candidate | None:
        """The fastest layout that runs."""
        return self.candidates[0] if self.candidates[0].runs else None

    def ranked(self, count: int) -> list[Candidate]:
        """The `count` fastest, one per (tp, pp, cp): of those alike but for details, the fastest."""
        seen: set[tuple[int, int, int]] = set()
        chosen = []
        for candidate in self.candidates:
            layout = candidate.job.layout
            key = (layout.tp, layout.pp, layout.cp)
            if candidate.runs and key not in seen:
                seen.add(key)
                chosen.append(candidate)
        return chosen[:count]

    def reasons(self) -> list[tuple[str, int]]:
        """Why layouts do not run, most frequent first; reasons that differ in numbers are one, by example."""
        examples: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for candidate in self.candidates:
            if not candidate.runs:
                reason = "out of memory" if candidate.memory is not None else candidate.reason
                kind = re.sub(r"\d+", "#", reason)
                examples.setdefault(kind, reason)
                counts[kind] += 1
        return [(examples[kind], count) for kind, count in counts.most_common()]

    def nearest_miss(self) -> Candidate | None:
        """The layout out of memory that needs least."""
        misses = [c for c in self.candidates if c.memory is not None and not c.runs]
        return min(misses, key=lambda c: c.needed_bytes, default=None)


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    shape: ModelShape,
    world_size: int,
    gpu: Gpu,
    *,
    transformer_engine: bool,
    simulated_steps: int = 0,
) -> StagePlan:
    """Search all layouts of one stage.

    Args:
        transformer_engine: plan with its layers; otherwise with PyTorch's own kernels.
        simulated_steps: play that many batches through the best layout; 0 does not.
    """
    batches = stage_batches(stage, max(SAMPLED_STEPS, simulated_steps))
    job = job_of(recipe, stage, shape, world_size, transformer_engine=transformer_engine)
    sampled = batches.documents[:SAMPLED_STEPS]
    candidates = search(job, gpu, sampled)
    best = candidates[0]
    played = simulate(best.job, gpu, batches) if simulated_steps and best.runs else None
    return StagePlan(stage, batches, evaluate(job, gpu, sampled), candidates, played)


def with_best_layouts(recipe: Recipe, plans: list[StagePlan]) -> Recipe:
    """The recipe with every planned stage at its best layout; stages without one stay as they are."""
    best = {plan.stage.name: plan.best for plan in plans}
    stages = [
        stage if (choice := best.get(stage.name)) is None else _at(stage, choice.job)
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def _at(stage: Stage, job: Job) -> Stage:
    layout = LayoutOverride(**job.layout.model_dump())
    return stage.model_copy(update={"layout": layout, "recompute": job.recompute})


def to_json(plan: StagePlan, gpu: Gpu, count: int) -> dict[str, Any]:
    """Plain JSON values of one stage's plan."""
    return {
        "stage": plan.stage.name,
        "gpu": gpu.name,
        "document_lengths": plan.batches.source,
        "attention": plan.written.job.attention,
        "recipe": candidate_json(plan.written, gpu, plan.stage.num_steps),
        "layouts": [candidate_json(c, gpu, plan.stage.num_steps) for c in plan.ranked(count)],
        "rejected": dict(plan.reasons()),
    }


def candidate_json(candidate: Candidate, gpu: Gpu, num_steps: int) -> dict[str, Any]:
    """Plain JSON values of one layout."""
    found: dict[str, Any] = {
        "layout": candidate.job.layout.model_dump(),
        "recompute": candidate.job.recompute,
        "dp": candidate.job.dp,
        "gpus": candidate.job.world_size,
    }
    if candidate.memory is not None:
        found["memory_bytes"] = {**candidate.memory.parts(), "needed": round(candidate.needed_bytes)}
    if candidate.time is None:
        return {**found, "reason": candidate.reason}
    hours = candidate.gpu_hours(num_steps)
    return {
        **found,
        "sent_bytes_per_step": asdict(step_volume(candidate.job, pp_rank=0)),
        "step_seconds": {**candidate.time.parts(), "total": candidate.time.total},
        "tokens_per_second_per_gpu": candidate.throughput,
        "mfu": candidate.mfu,
        "gpu_hours": hours,
        "usd": hours * gpu.price_per_hour,
    }

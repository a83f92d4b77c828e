"""The plan of a recipe on a cluster: computed once, then printed, drawn (page.py) or written into a recipe."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from megatron_prolong.page.amount import amount
from megatron_prolong.plan.batches import Batches, stage_batches
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job, job_of
from megatron_prolong.plan.search import AS_FAST, Candidate, best_of, evaluate, search
from megatron_prolong.plan.simulate import Simulation, simulate
from megatron_prolong.plan.volume import step_volume
from megatron_prolong.recipe.schema import LayoutOverride, Recipe, Stage, settings_of
from megatron_prolong.recipe.shape import ModelShape

SAMPLED_STEPS = 16
_KERNELS = {
    "te": "Transformer Engine",
    "flash2": "PyTorch's FlashAttention-2 (--te plans with Transformer Engine)",
    "flash3": "PyTorch's, with FlashAttention-3",
}


def kernels_in_words(job: Job) -> str:
    """Whose kernels the layers are made of and attend with."""
    if job.transformer_engine and job.deterministic:
        return "Transformer Engine, attention PyTorch's (deterministic)"
    return _KERNELS[job.attention]


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
        """The layout to run, if any does."""
        return best_of(self.candidates)

    def ranked(self, count: int) -> list[Candidate]:
        """The `count` fastest, one per (tp, pp, cp): of those alike but for details, the fastest.

        The last gives way to the best one where that is not among them.
        """
        seen: set[tuple[int, int, int]] = set()
        chosen = []
        for candidate in self.candidates:
            layout = candidate.job.layout
            key = (layout.tp, layout.pp, layout.cp)
            if candidate.runs and key not in seen:
                seen.add(key)
                chosen.append(candidate)
        shown = chosen[:count]
        if self.best is not None and self.best not in shown:
            shown[-1] = self.best
        return shown

    def head_room(self, count: int) -> str:
        """What the mark of a tight layout means, if one of the `count` shown (or the recipe's) has it."""
        if not any(candidate.tight for candidate in [*self.ranked(count), self.written]):
            return ""
        text = (
            "! less than 5% of the GPU's memory left, and what a real allocator takes of that is unmeasured"
        )
        assert self.best is not None, "one that runs is the best"
        if self.best.tight:
            return f"{text}; nothing with more room is within 10% of its speed"
        slower = 1 - self.best.throughput / self.candidates[0].throughput
        return f"{text}; best: {self.best.name}, {slower:.0%} slower" if self.candidates[0].tight else text

    def why_slower(self) -> str:
        """Where the recipe's layout loses most against the best one; empty where it is nearly as fast."""
        ours, best = self.written, self.best
        if ours.time is None or best is None or ours.throughput >= AS_FAST * best.throughput:
            return ""
        assert best.time is not None
        spent, needed = ours.time.parts(), best.time.parts()
        part = max(spent.keys() - {"overhead"}, key=lambda name: spent[name] - needed[name])
        cause = _cause(part, ours.job, best.job)
        return f"{part}, {amount(spent[part])} s/step instead of {amount(needed[part])}{cause}"

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


def _cause(part: str, ours: Job, best: Job) -> str:
    """Why `part` of a step is longer at our layout than at the best one, where its name does not say it."""
    if part == "imbalance":
        return (
            f": {ours.batch_sequences} sequences do not deal out evenly to dp {ours.dp}, and all wait for the "
            "fullest rank; more cp, tp or pp leaves fewer ranks to wait"
        )
    if part == "pipeline":
        return f": {ours.micro_batches} micro-batches must fill and drain pp {ours.layout.pp}"
    if part in ("matmul", "attention") and ours.recompute not in ("none", best.recompute):
        return f": recompute {ours.recompute}, the best has {best.recompute}"
    return ""


def plan_stage(
    recipe: Recipe,
    stage: Stage,
    shape: ModelShape,
    world_size: int,
    gpu: Gpu,
    *,
    transformer_engine: bool,
    flash: str = "flash2",
    simulated_steps: int = 0,
) -> StagePlan:
    """Search all layouts of one stage.

    Args:
        transformer_engine: plan with its layers; otherwise with PyTorch's own kernels.
        flash: what is behind PyTorch's flash attention, "flash2" or "flash3".
        simulated_steps: play that many batches through the best layout; 0 does not.
    """
    batches = stage_batches(stage, max(SAMPLED_STEPS, simulated_steps))
    job = job_of(recipe, stage, shape, world_size, transformer_engine=transformer_engine, flash=flash)
    sampled = batches.documents[:SAMPLED_STEPS]
    candidates = search(job, gpu, sampled)
    best = best_of(candidates)
    played = simulate(best.job, gpu, batches) if simulated_steps and best is not None else None
    return StagePlan(stage, batches, evaluate(job, gpu, sampled), candidates, played)


def with_best_layouts(recipe: Recipe, plans: list[StagePlan]) -> Recipe:
    """The recipe with every planned stage at its best layout; stages without one stay as they are."""
    best = {plan.stage.name: plan.best for plan in plans}
    stages = []
    for stage in recipe.stages:
        choice = best.get(stage.name)
        layout = settings_of(recipe, stage).layout if choice is None else choice.job.layout
        recompute = stage.recompute if choice is None else choice.job.recompute
        changed = {"layout": LayoutOverride(**layout.model_dump()), "recompute": recompute}
        stages.append(stage.model_copy(update=changed))
    # A stage can name layers of its own, but at the recipe's pp not take back the recipe's.
    shared = recipe.layout.model_copy(update={"first_stage_layers": None, "last_stage_layers": None})
    return recipe.model_copy(update={"stages": stages, "layout": shared})


def to_json(plan: StagePlan, gpu: Gpu, count: int) -> dict[str, Any]:
    """Plain JSON values of one stage's plan."""
    return {
        "stage": plan.stage.name,
        "gpu": gpu.name,
        "document_lengths": plan.batches.source,
        "attention": plan.written.job.attention,
        "recipe": candidate_json(plan.written, gpu, plan.stage.num_steps),
        "best": candidate_json(plan.best, gpu, plan.stage.num_steps) if plan.best is not None else None,
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
        "tight": candidate.tight,
        "sent_bytes_per_step": asdict(step_volume(candidate.job, pp_rank=0)),
        "step_seconds": {**candidate.time.parts(), "total": candidate.time.total},
        "tokens_per_second_per_gpu": candidate.throughput,
        "mfu": candidate.mfu,
        "gpu_hours": hours,
        "usd": hours * gpu.price_per_hour,
    }

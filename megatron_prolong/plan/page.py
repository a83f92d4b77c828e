"""The plan as one HTML page: memory bars, the frontier of memory and speed, and the ranking."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_prolong.page.charts import Point, scatter, stacked_bars
from megatron_prolong.page.html import figure, heading, note, page, table
from megatron_prolong.plan.figures import figures
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.report import StagePlan, kernels_in_words
from megatron_prolong.plan.search import Candidate, frontier

_SHOWN = 8


def plan_page(recipe_name: str, plans: list[StagePlan], gpu: Gpu) -> str:
    """HTML of the plans of a recipe's stages on one cluster."""
    world = plans[0].written.job.world_size
    body = [
        note(
            f"{world} × {gpu.name}, USD {gpu.price_per_hour} per GPU and hour. Predictions, not measurements."
        )
    ]
    for plan in plans:
        body += _stage(plan, gpu)
    return page(f"Plan of {recipe_name} on {world} × {gpu.name}", body)


def _stage(plan: StagePlan, gpu: Gpu) -> Iterator[str]:
    stage = plan.stage
    yield heading(f"Stage {stage.name}")
    yield note(
        f"{stage.num_steps} steps of {stage.batch_sequences} × {stage.sequence_length} tokens. "
        f"Document lengths: {plan.batches.source}. Layers and attention: {kernels_in_words(plan.written.job)}."
    )
    if plan.best is None:
        miss = plan.nearest_miss()
        yield note("No layout runs." + (f" Nearest: {miss.name}: {miss.reason}." if miss else ""))
        return
    best = plan.ranked(_SHOWN)
    yield table(
        ["layout", "GB per GPU", "seconds per step", "tokens/s/GPU", "MFU", "GPU-hours", "USD"],
        [[candidate.name, *figures(candidate, gpu, stage.num_steps)] for candidate in best],
    )
    if head_room := plan.head_room(_SHOWN):
        yield note(head_room)
    yield figure(
        stacked_bars(_memory_rows([*best, *_written(plan)]), "GB", gpu.memory_bytes / 1e9),
        "Memory of the fullest GPU by part; dashed: what the GPU has.",
    )
    yield figure(
        stacked_bars([(c.name, c.time.parts()) for c in best if c.time is not None], "s"),
        "Seconds of a step by part.",
    )
    edge = {id(candidate) for candidate in frontier(plan.candidates)}
    points = [
        Point(c.needed_bytes / 1e9, c.throughput, c.name, id(c) in edge) for c in plan.candidates if c.runs
    ]
    yield figure(
        scatter(points, "GB per GPU", "tokens/s/GPU"),
        f"All {len(points)} layouts that run; blue: no other one is both smaller and faster.",
    )
    yield note("Why the others do not run:")
    yield table(["reason", "layouts"], [(reason, str(count)) for reason, count in plan.reasons()[:12]])


def _written(plan: StagePlan) -> list[Candidate]:
    return [plan.written] if plan.written.memory is not None else []


def _memory_rows(candidates: list[Candidate]) -> list[tuple[str, dict[str, float]]]:
    rows = []
    for candidate in candidates:
        assert candidate.memory is not None
        parts = {name: value / 1e9 for name, value in candidate.memory.parts().items()}
        parts["reserve"] = candidate.needed_bytes / 1e9 - sum(parts.values())
        rows.append((candidate.name, parts))
    return rows

"""Repeat one step of a run to look at it, from the newest checkpoint before it; nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.profiler

from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.run_files import METRICS, RESOLVED_RECIPE
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.runtime.agreement import together
from megatron_prolong.runtime.launch import World
from megatron_prolong.runtime.strict_json import read_lines, with_nan
from megatron_prolong.training.prepare import StageInput
from megatron_prolong.training.run import initial_directory, stage_input
from megatron_prolong.training.run_directory import Checkpoint, StageStatus, checkpoints, latest_checkpoint
from megatron_prolong.training.stage import open_stage
from megatron_prolong.training.step import StepMetrics


@dataclass(frozen=True)
class Replayed:
    """One step that was made again; `recorded` is its line of metrics.jsonl, if the run got that far."""

    step: int
    metrics: StepMetrics
    sequences: list[PackedSequence]
    recorded: dict[str, Any] | None

    def lines(self) -> Iterator[str]:
        """What there is to say about it."""
        found = self.metrics
        yield f"loss {found.loss:.6g}  grad norm {found.grad_norm:.6g}  lr {found.lr:.3g}"
        if self.recorded is not None:
            yield f"recorded: loss {self.recorded['loss']:.6g}  grad norm {self.recorded['grad_norm']:.6g}"
        yield f"{found.num_targets:,} targets; the update was {'made' if found.updated else 'skipped'}"
        yield "samples:"
        for sequence in self.sequences:
            yield f"  {sequence.identity}"


def parse_step(text: str, recipe: Recipe) -> tuple[Stage, int]:
    """STAGE:STEP, or STEP where the recipe has only one stage; steps count from 1, as in the log.

    Raises:
        UserError: no such stage or step.
    """
    name, _, number = text.rpartition(":")
    stages = {stage.name: stage for stage in recipe.stages}
    if not name and len(stages) > 1:
        raise UserError(f"--replay {text}: say of which stage, e.g. {recipe.stages[-1].name}:{text}")
    stage = stages.get(name) if name else recipe.stages[0]
    if stage is None:
        raise UserError(f"--replay {text}: the recipe has no stage {name}; it has {', '.join(stages)}")
    if not number.isdecimal() or not 1 <= int(number) <= stage.num_steps:
        raise UserError(f"--replay {text}: stage {stage.name} has the steps 1 to {stage.num_steps}")
    return stage, int(number)


def replay(
    recipe: Recipe, stage: Stage, step: int, world: World, trace: Path | None = None
) -> Iterator[Replayed]:
    """Make the steps from the newest checkpoint before `step` up to it. Collective; yields each as it is made.

    Args:
        trace: directory for a profile of `step` itself; what came before it has warmed up.

    Raises:
        UserError: there is no such checkpoint, it does not fit the recipe, or the GPU's memory is full.
        RankLost: another rank died.
    """
    start = together(lambda: _start(recipe, stage, step))
    recorded = _recorded(recipe.run_dir / METRICS, stage.name)
    with open_stage(recipe, stage, start, world) as (run, state, watchdog):
        for index, (sequences, assignment) in run.batches(state.step):
            watchdog.feed(index + 1)
            is_last = index + 1 == step
            name = f"{stage.name}_{step}_rank{world.rank}.json.gz"
            with _tracing(trace / name if trace and is_last else None):
                metrics = run.update(index, sequences, assignment)
            yield Replayed(index + 1, metrics, sequences, recorded.get(index + 1))
            if is_last:
                return


@contextmanager
def _tracing(path: Path | None) -> Iterator[None]:
    """Record every operator and kernel in between, for chrome://tracing or Perfetto."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    profile.export_chrome_trace(str(path))


def _start(recipe: Recipe, stage: Stage, step: int) -> StageInput:
    if not (recipe.run_dir / RESOLVED_RECIPE).exists():
        raise UserError(f"{recipe.run_dir}: no run is here, so there is no step of it to make again")
    earlier = [saved for saved in checkpoints(recipe.run_dir / stage.name) if saved.step < step]
    if earlier:
        return StageInput(earlier[-1], optimizer=True, resume=True)
    position = recipe.stages.index(stage)
    if position and stage.carry.weights:
        source = latest_checkpoint(recipe.run_dir / recipe.stages[position - 1].name)
    else:
        initial = initial_directory(recipe)
        source = Checkpoint.open(initial) if initial.exists() else None  # gone, maybe: its stages have begun
    if source is None:
        raise UserError(f"{recipe.run_dir}: no checkpoint before step {step} of stage {stage.name}")
    return stage_input(StageStatus(stage, None), source, source)


def _recorded(path: Path, stage: str) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl about a stage's steps; the last one where a step was made twice."""
    records = (with_nan(record) for record in read_lines(path))
    return {record["step"]: record for record in records if record.get("stage") == stage and "loss" in record}

"""What a run has done, from its metrics.jsonl and recipe.yaml.

A run that was interrupted, or sent back to an older checkpoint, repeats the steps after it: a line takes the place
of that step's and of all that followed. A line that is cut off (the writer died) or damaged is skipped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.run_files import METRICS, RESOLVED_RECIPE
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.recipe.shape import MANIFEST
from megatron_prolong.runtime.progress import RECENT_STEPS
from megatron_prolong.runtime.strict_json import read_lines, with_nan

_NUMBER = int | float | None
_KINDS = {
    "time": int | float, "event": str, "stage": str, "step": int, "scores": dict, "domains": dict,
    "loss": _NUMBER, "lr": _NUMBER, "grad_norm": _NUMBER, "tokens_per_second": _NUMBER,
    "tflops_per_rank": _NUMBER, "step_seconds": _NUMBER, "peak_memory_bytes": _NUMBER,
    "balance": _NUMBER,
}  # fmt: skip


@dataclass(frozen=True)
class StageHistory:
    """One stage of a run.

    Attributes:
        stage: as the recipe has it.
        records: one line of metrics.jsonl per step, in order of the steps.
    """

    stage: Stage
    records: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.stage.num_steps

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every record that has `key`."""
        return [(float(r["step"]), float(r[key])) for r in self.records if r.get(key) is not None]

    def last(self, key: str) -> float | None:
        """Newest value of `key`."""
        return next((float(r[key]) for r in reversed(self.records) if r.get(key) is not None), None)

    @property
    def step_seconds(self) -> float | None:
        """Median of the latest steps."""
        recent = [r["step_seconds"] for r in self.records[-RECENT_STEPS:] if r.get("step_seconds")]
        return statistics.median(recent) if recent else None

    @property
    def remaining_seconds(self) -> float | None:
        """Expected time to the stage's end; None while no step was timed."""
        seconds = self.step_seconds
        return None if seconds is None else (self.stage.num_steps - self.step) * seconds


@dataclass(frozen=True)
class RunHistory:
    """A run directory.

    Attributes:
        events: lines of metrics.jsonl that are not steps, oldest first.
        updated: seconds since the epoch of the newest line; None before the first.
    """

    directory: Path
    recipe: Recipe
    stages: list[StageHistory]
    events: list[dict[str, Any]]
    updated: float | None

    @property
    def current(self) -> StageHistory:
        """The stage that is running, is next, or (when all are done) was last."""
        return next((stage for stage in self.stages if not stage.done), self.stages[-1])

    @property
    def done(self) -> bool:
        """Whether every stage is done."""
        return all(stage.done for stage in self.stages)

    @property
    def remaining_seconds(self) -> float | None:
        """Expected time to the end of the current stage; later stages are not timed yet."""
        return 0.0 if self.done else self.current.remaining_seconds

    @property
    def idle_seconds(self) -> float | None:
        """Time since the run last wrote a line."""
        return None if self.updated is None else max(0.0, time.time() - self.updated)


def recipe_of_run(directory: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a run directory, with overrides.

    Raises:
        UserError: it is none, or its recipe cannot be read.
    """
    if not _is_run(directory):
        raise UserError(
            f"{directory}: no run directory, which holds a {RESOLVED_RECIPE} and a directory for every stage"
        )
    return load_recipe(directory / RESOLVED_RECIPE, overrides)


def read_run(directory: Path) -> RunHistory:
    """Read a run directory.

    Raises:
        UserError: it is none, or its recipe cannot be read.
    """
    recipe = recipe_of_run(directory)
    names = [stage.name for stage in recipe.stages]
    steps: list[list[dict[str, Any]]] = [[] for _ in names]
    events, updated = [], None
    for record in _records(directory / METRICS):
        updated = record.get("time", updated)
        if "event" in record:
            events.append(record)
        elif record.get("stage") in names and "step" in record:
            mine, *later = steps[names.index(record["stage"]) :]
            while mine and mine[-1]["step"] >= record["step"]:
                mine.pop()
            mine.append(with_nan(record))
            for gone in later:
                gone.clear()
    stages = [StageHistory(stage, records) for stage, records in zip(recipe.stages, steps, strict=True)]
    return RunHistory(directory, recipe, stages, events, updated)


def find_runs(directory: Path) -> list[Path]:
    """Run directories in `directory` (itself included), up to two levels down, oldest first."""
    if _is_run(directory):
        return [directory]
    # Of what it may not look into (another user's, lost+found) `glob` is silent, where `is_file` raises.
    recipes = (path for pattern in ("*", "*/*") for path in directory.glob(f"{pattern}/{RESOLVED_RECIPE}"))
    found = [path.parent for path in recipes if _is_run(path.parent)]
    return sorted(found, key=lambda path: (path / RESOLVED_RECIPE).stat().st_mtime)


def _is_run(directory: Path) -> bool:
    """Whether it is a run's directory. A checkpoint holds the recipe too, beside its manifest."""
    return (directory / RESOLVED_RECIPE).is_file() and not (directory / MANIFEST).exists()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for record in read_lines(path):
        if all(isinstance(record[key], kind) for key, kind in _KINDS.items() if key in record):
            yield record

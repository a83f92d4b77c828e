"""Where a run stands, and what may change in its recipe between two starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.training.run_directory import Checkpoint, latest_checkpoint

LOSS_WINDOW = 50


@dataclass(frozen=True)
class TrainState:
    """Progress inside one stage; saved with every checkpoint.

    Attributes:
        step: updates made (skipped ones included); also the position in the batch stream.
        tokens: tokens consumed by the stage, padding included.
        skipped: steps whose update was left out: they had no targets, or a non-finite loss or gradient.
        skipped_in_a_row: of them, the last ones.
        recent_losses: of the last LOSS_WINDOW steps that made an update. In the checkpoint, so that a run that goes
            on judges a step as one that was never stopped (training/guard.py).
        domain_tokens: tokens consumed by domain.
        stream: fingerprint of the batch stream; a resume on another stream is refused.
    """

    stage: str
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    domain_tokens: dict[str, int] = field(default_factory=dict)
    stream: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        return cls(**fields)


@dataclass(frozen=True)
class StageStatus:
    """One line of `prolong status`."""

    stage: Stage
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        """Updates that are safe on disk."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def word(self) -> str:
        """waiting, in progress or done."""
        if self.step >= self.stage.num_steps:
            return "done"
        return "in progress" if self.step else "waiting"


def chain_status(recipe: Recipe, run_dir: Path) -> list[StageStatus]:
    """The stages of the recipe in order, each with its newest complete checkpoint."""
    return [StageStatus(stage, latest_checkpoint(run_dir / stage.name)) for stage in recipe.stages]


# Changing one of these in a stage that has begun would make its numbers depend on when it was stopped.
_FIXED_IN_STAGE = {
    "sequence_length", "rope_base", "batch_tokens", "steps", "tokens", "warmup", "schedule", "seed", "carry",
    "loss_mask", "precision",
}  # fmt: skip
_FIXED_IN_RUN = {"model", "precision"}


def compare_recipes(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> tuple[list[str], list[str]]:
    """What changed since the run was last started.

    Returns:
        Notices (allowed changes) and refusals, each "key: old → new" with the reason for a refusal.
    """
    notices, refusals = [], []
    for key, old, new in _differences(_without_stages(before), _without_stages(now)):
        change = f"{key}: {old} → {new}"
        if key.split(".")[0] in _FIXED_IN_RUN:
            refusals.append(f"{change} (fixed for the whole run)")
        else:
            notices.append(change)
    stages_before = {stage.name: stage for stage in before.stages}
    for status in statuses:
        stage = status.stage
        if status.word == "waiting" or stage.name not in stages_before:
            continue
        for key, old, new in _differences(_dump(stages_before[stage.name]), _dump(stage)):
            change = f"stage.{stage.name}.{key}: {old} → {new}"
            if status.word == "done" or key.split(".")[0] in _FIXED_IN_STAGE:
                refusals.append(f"{change} (the stage is {status.word})")
            else:
                notices.append(change)
    begun = {status.stage.name for status in statuses if status.word != "waiting"}
    for name in stages_before.keys() - {stage.name for stage in now.stages}:
        if latest_checkpoint(now.run_dir / name):
            refusals.append(
                f"stage {name}: removed or renamed (to give it up, move {now.run_dir / name} away)"
            )
        else:
            notices.append(f"stage {name}: removed")
    order_before = [stage.name for stage in before.stages if stage.name in begun]
    order_now = [stage.name for stage in now.stages if stage.name in begun]
    if order_before != order_now:
        refusals.append(f"stages that have begun were reordered: {order_before} → {order_now}")
    return notices, refusals


def refuse_changes(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> list[str]:
    """The allowed changes; raises UserError when there are refused ones."""
    notices, refusals = compare_recipes(before, now, statuses)
    if refusals:
        raise UserError.many(
            f"{now.run_dir} was started with another recipe, and these changes cannot be taken up half-way "
            "(undo them, or choose another run_dir):",
            refusals,
        )
    return notices


def refuse_gaps(statuses: list[StageStatus]) -> None:
    """Raises UserError when a stage is not done but a later one has begun, which would see nothing of it."""
    unfinished = next((status for status in statuses if status.word != "done"), None)
    begun = [status for status in statuses if status.step]
    if unfinished is not None and begun and statuses.index(begun[-1]) > statuses.index(unfinished):
        later = begun[-1].stage.name
        raise UserError(
            f"stage {unfinished.stage.name} is at step {unfinished.step} of {unfinished.stage.num_steps}, but "
            f"stage {later} after it has begun, from other weights; to go on with {later}, put the checkpoints "
            f"of {unfinished.stage.name} back or take it out of the recipe; to train {later} anew, move its "
            "directory away"
        )


def work_of(recipe: Recipe) -> dict[str, Any]:
    """What all ranks must agree on. A node may have the mixture's data in a place of its own: what is in it is
    compared when the stage begins."""
    work = _dump(recipe)
    work["stages"] = {stage["name"]: stage for stage in work["stages"]}
    for stage in work["stages"].values():
        if isinstance(stage["mixture"], dict):
            stage["mixture"] = list(stage["mixture"].values())
    return work | {"version": versions()}


def refuse_other_work(main: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises UserError when this rank's `work_of` is not rank 0's: it would train a model of its own."""
    problems = [f"{key}: {here}, but {there} on rank 0" for key, there, here in _differences(main, own)]
    if problems:
        raise UserError.many(
            "not the recipe or the packages of rank 0; give all nodes the same files:", problems
        )


def versions() -> dict[str, str]:
    """Of the packages that make the numbers."""
    return {name: version(name) for name in ("megatron-prolong", "megatron-core", "torch")}


def _dump(model: Any) -> dict[str, Any]:
    return model.model_dump(mode="json")


def _without_stages(recipe: Recipe) -> dict[str, Any]:
    dumped = _dump(recipe)
    for key in ("stages", "base", "run_dir", "name"):
        dumped.pop(key, None)
    return dumped


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new

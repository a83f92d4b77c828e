"""What may change between two starts of a run, and what must be the same on all of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.recipe.run_files import RESOLVED_RECIPE
from megatron_prolong.recipe.schema import Recipe, Stage, settings_of
from megatron_prolong.training.run_directory import StageStatus, chain_status, latest_checkpoint

# Changing one of these in a stage that has begun would make its numbers depend on when it was stopped.
_FIXED_IN_STAGE = {
    "sequence_length", "rope_base", "yarn", "batch_tokens", "steps", "tokens", "warmup", "schedule", "seed",
    "carry", "loss_mask", "precision", "mixture",
}  # fmt: skip


class Change(NamedTuple):
    """What differs between two starts, and why it cannot be taken up half-way, if it cannot."""

    what: str
    refusal: str | None = None

    def __str__(self) -> str:
        return f"{self.what} ({self.refusal})" if self.refusal else self.what


def changes_since_start(recipe: Recipe) -> list[str]:
    """What differs from the recipe that this run was last started with; nothing, where it is new.

    Raises:
        UserError: the run cannot go on with this recipe, or with what is in its directory.
    """
    path, statuses = recipe.run_dir / RESOLVED_RECIPE, chain_status(recipe, recipe.run_dir)
    changes = refuse_changes(_started_with(path), recipe, statuses) if path.exists() else []
    refuse_gaps(statuses)
    return changes


def _started_with(path: Path) -> Recipe:
    try:
        return load_recipe(path)
    except UserError as error:
        raise UserError(
            f"{error}\n{path} says how the run was started; put the {path.name} of its newest checkpoint in its "
            "place"
        ) from error


def refuse_changes(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> list[str]:
    """The allowed changes since the run was last started; raises UserError when there are refused ones."""
    changes = [
        *_run_changes(before, now),
        *_stage_changes(before, now, statuses),
        *_removed_stages(before, now),
        *_added_stages(before, now, statuses),
        *_reordered_stages(before, now, statuses),
    ]
    if refused := [str(change) for change in changes if change.refusal]:
        raise UserError.many(
            f"{now.run_dir} was started with another recipe, and these changes cannot be taken up half-way "
            "(undo them, or choose another run_dir):",
            refused,
        )
    return [str(change) for change in changes]


def _run_changes(before: Recipe, now: Recipe) -> Iterator[Change]:
    for key, old, new in _differences(_without_stages(before), _without_stages(now)):
        fixed = key.split(".")[0] == "model"
        yield Change(f"{key}: {old} → {new}", "fixed for the whole run" if fixed else None)


def _stage_changes(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> Iterator[Change]:
    stages_before = {stage.name: stage for stage in before.stages}
    for status in statuses:
        stage = status.stage
        if status.word == "waiting" or stage.name not in stages_before:
            continue
        old_stage, new_stage = (
            _dump(one) | {"precision": _precision(of, one)}
            for of, one in ((before, stages_before[stage.name]), (now, stage))
        )
        same_proportions = _proportions(old_stage["mixture"]) == _proportions(new_stage["mixture"])
        for key, old, new in _differences(old_stage, new_stage):
            first = key.split(".")[0]
            moved = first == "mixture" and same_proportions
            past = first == "skip_steps" and _disagree(stages_before[stage.name], stage, status.step)
            fixed = not moved and (status.word == "done" or past or first in _FIXED_IN_STAGE)
            refusal = f"the stage is at step {status.step}" if fixed else None
            yield Change(f"stage.{stage.name}.{key}: {old} → {new}", refusal)


def _precision(recipe: Recipe, stage: Stage) -> str:
    """With what scales FP8's numbers, where it is FP8."""
    precision = settings_of(recipe, stage).precision
    return f"fp8 ({recipe.fp8_recipe})" if precision == "fp8" else precision


def _disagree(old: Stage, new: Stage, made: int) -> bool:
    """Whether one of the two passes over a step, of those made so far, that the other does not."""
    return any(old.skips(step) != new.skips(step) for step in range(1, made + 1))


def _removed_stages(before: Recipe, now: Recipe) -> Iterator[Change]:
    for name in sorted({stage.name for stage in before.stages} - {stage.name for stage in now.stages}):
        directory = now.run_dir / name
        begun = latest_checkpoint(directory) is not None
        yield Change(
            f"stage {name}: removed{' or renamed' if begun else ''}",
            f"to give it up, move {directory} away" if begun else None,
        )


def _added_stages(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> Iterator[Change]:
    """Those that have begun all the same, as one that left the recipe and comes back."""
    for status in statuses:
        name, directory = status.stage.name, now.run_dir / status.stage.name
        if status.step and name not in {stage.name for stage in before.stages}:
            yield Change(
                f"stage {name}: added",
                f"it is at step {status.step}, of a recipe that {now.run_dir / RESOLVED_RECIPE} does not tell; put "
                f"the {RESOLVED_RECIPE} of its newest checkpoint in that one's place, or move {directory} away",
            )


def _reordered_stages(before: Recipe, now: Recipe, statuses: list[StageStatus]) -> Iterator[Change]:
    in_both = {stage.name for stage in before.stages} & {stage.name for stage in now.stages}
    begun = in_both & {status.stage.name for status in statuses if status.step}
    old, new = ([stage.name for stage in of.stages if stage.name in begun] for of in (before, now))
    if old != new:
        yield Change(f"order of the stages: {old} → {new}", "they have begun")


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
    from megatron_prolong.convert.manifest import versions  # with it comes torch

    work = _dump(recipe)
    work["stages"] = {stage["name"]: stage for stage in work["stages"]}
    for stage in work["stages"].values():
        stage["mixture"] = _proportions(stage["mixture"])
    return work | {"version": versions()}


def refuse_other_work(main: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises UserError when this rank's `work_of` is not rank 0's: it would train a model of its own."""
    problems = [f"{key}: {here}, but {there} on rank 0" for key, there, here in _differences(main, own)]
    if problems:
        raise UserError.many(
            "not the recipe or the packages of rank 0; give all nodes the same files:", problems
        )


def _proportions(mixture: dict[str, float] | str) -> list[float] | str:
    """In their order, which is that of the batch stream; or the word mock."""
    return list(mixture.values()) if isinstance(mixture, dict) else mixture


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

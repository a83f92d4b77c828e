"""Room on the disk for a run's checkpoints, looked at before training: the first of them may be a day away."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.counts import num_parameters
from megatron_prolong.recipe.run_files import DELETING, SAVING, complete_checkpoints, nearest_existing
from megatron_prolong.recipe.schema import Recipe, Stage, settings_of
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.recipe.validate import incoming_shape

REMEDY = "free space, choose another run_dir, or keep fewer (checkpoint.keep, checkpoint.keep_every)"


@dataclass(frozen=True)
class CheckpointRoom:
    """What the checkpoints that are not there yet take, and what is free.

    Attributes:
        one: bytes of a checkpoint.
        needed: bytes of all to come, as many as lie on the disk at once.
        free: bytes, with those that the next save frees first.
        directory: run_dir, or the nearest one above it that exists.
    """

    one: int
    needed: int
    free: int
    directory: Path

    @property
    def fits(self) -> bool:
        """Whether there is room for all of them."""
        return self.needed <= self.free

    def __str__(self) -> str:
        size, unit = (1e9, "GB") if self.needed >= 1e8 else (1e6, "MB")
        return (
            f"{self.needed / size:.1f} {unit} at most ({self.one / size:.1f} each), {self.free / size:.0f} {unit} "
            f"free at {self.directory}"
        )


def checkpoint_room(recipe: Recipe, shape: ModelShape) -> CheckpointRoom:
    """Of bf16 weights (or fp32, if one stage has these), fp32 main weights and two moments each."""
    in_fp32 = any(settings_of(recipe, stage).precision == "fp32" for stage in recipe.stages)
    one = (16 if in_fp32 else 14) * num_parameters(shape)
    existing = nearest_existing(recipe.run_dir.absolute())
    free = shutil.disk_usage(existing).free + _left_over(recipe.run_dir)
    return CheckpointRoom(one, one * _to_come(recipe), free, existing)


def check_room(recipe: Recipe) -> None:
    """Refuse a run whose disk would be full one day.

    Raises:
        UserError: with what is needed and what is free.
    """
    room = checkpoint_room(recipe, incoming_shape(recipe))
    if not room.fits:
        raise UserError(f"no room for the checkpoints: {room}; {REMEDY}")


def _left_over(run_dir: Path) -> int:
    """Bytes of what killed processes were saving or deleting."""
    total = 0
    for name in (SAVING, DELETING):
        for path in run_dir.glob(f"*/{name}/**/*"):
            with suppress(FileNotFoundError):  # the processes may not be dead
                total += path.stat().st_size
    return total


def _to_come(recipe: Recipe) -> int:
    """Checkpoints of all stages that will be kept and are not there; one more is written before one is deleted."""
    there = {stage.name: complete_checkpoints(recipe.run_dir / stage.name) for stage in recipe.stages}
    if all(stage.num_steps in there[stage.name] for stage in recipe.stages):
        return 0
    return 1 + sum(max(0, _kept(recipe, stage) - len(there[stage.name])) for stage in recipe.stages)


def _kept(recipe: Recipe, stage: Stage) -> int:
    spec, pause = recipe.checkpoint, recipe.evaluation and recipe.evaluation.every
    lasting = stage.num_steps // spec.keep_every if spec.keep_every else 0
    saved = -(-stage.num_steps // spec.every) + (stage.num_steps // pause if pause else 0)
    return min(saved, spec.keep + lasting)

"""The checkpoints of a run on disk: found, named, pruned; where its stages stand. Reading needs no torch.

RUN/STAGE/step_00000125/ is a complete checkpoint: a directory never has that name before everything in it is on
disk. RUN/STAGE/latest names the newest one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.run_files import DELETING, LATEST, SAVING, complete_checkpoints, history
from megatron_prolong.recipe.schema import Recipe, Stage
from megatron_prolong.recipe.shape import MANIFEST, read_manifest
from megatron_prolong.runtime.publish import remove, remove_leftovers, write_durably


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint directory and its manifest."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates made when it was saved."""
        return int(self.manifest["step"])

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the manifest; raises UserError when the directory is not a checkpoint that this version can read."""
        if not (directory / MANIFEST).exists():
            raise UserError(f"{directory} is not a checkpoint: it holds no {MANIFEST}")
        return cls(directory, read_manifest(directory))


def latest_checkpoint(stage_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a stage, or None before the first.

    Without `latest` (lost, or not written yet by a process that was killed) the last one is taken: starting anew
    would in time overwrite them all.
    """
    pointer, complete = stage_dir / LATEST, [*complete_checkpoints(stage_dir).values()]
    if not complete and not pointer.exists():
        return None
    name = pointer.read_text(errors="replace").strip() if pointer.exists() else complete[-1].name
    others = ", ".join(path.name for path in complete if path.name != name) or "none left"
    if name not in (path.name for path in complete):
        raise UserError(f"{pointer}: {name!r} is no checkpoint there; write another name into it: {others}")
    try:
        return Checkpoint.open(stage_dir / name)
    except UserError as error:
        raise UserError(f"{error}; copy it again, or write another name into {pointer}: {others}") from error


def checkpoints(stage_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints that led to the newest, oldest first; none of a history that was given up."""
    latest_checkpoint(stage_dir)  # raises where `latest` names none
    return [Checkpoint.open(path) for path in history(stage_dir).values()]


def write_pointer(stage_dir: Path, name: str) -> None:
    """Make `latest` name a checkpoint, in one atomic step."""
    write_durably(stage_dir / LATEST, name + "\n")


def remove_given_up(stage_dir: Path, name: str) -> None:
    """Delete the checkpoints between `latest` and `name`, which is being saved: those of the history that was given
    up when `latest` was put back."""
    pointer = stage_dir / LATEST
    if not pointer.exists():
        return
    newest = pointer.read_text().strip()
    for path in complete_checkpoints(stage_dir).values():
        if newest < path.name <= name:
            remove(path)


def prune(stage_dir: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those of every `keep_every`-th step.

    The newest is the one that `latest` names; those beyond it stay until `remove_given_up` comes to them.
    """
    for step, old in [*history(stage_dir).items()][:-keep]:
        if keep_every is None or step % keep_every:
            remove(old)


def remove_unfinished(run_dir: Path) -> None:
    """Delete what killed processes were saving or deleting in any stage; nobody may be saving."""
    for stage_dir in run_dir.iterdir():
        remove_leftovers(stage_dir, LATEST)
        for doomed in stage_dir.glob(DELETING):
            shutil.rmtree(doomed, ignore_errors=True)
        for partial in stage_dir.glob(SAVING):
            remove(partial)


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

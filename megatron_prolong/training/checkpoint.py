"""Training checkpoints of a run: written aside, named when complete, pruned, found again.

RUN/STAGE/step_00000125/ is a complete checkpoint: a directory never has that name before everything in it is on
disk. RUN/STAGE/latest names the newest one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron_prolong.mcore.optimizer import MegatronOptimizer

from megatron_prolong.errors import UserError
from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.checkpoint import save_weights_and_optimizer

MANIFEST = "prolong.json"


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
        """Read the manifest; raises UserError when the directory is not a checkpoint of ours."""
        try:
            return cls(directory, json.loads((directory / MANIFEST).read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{directory} is not a checkpoint: {error}") from error


def latest_checkpoint(stage_dir: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a stage, or None before the first."""
    pointer = stage_dir / "latest"
    if not pointer.exists():
        return None
    return Checkpoint.open(stage_dir / pointer.read_text().strip())


def save_checkpoint(
    stage_dir: Path,
    step: int,
    model: StageModel,
    optimizer: MegatronOptimizer,
    manifest: dict[str, Any],
    sidecar: Path,
    keep: int,
) -> Path:
    """Save weights, optimizer and manifest as RUN/STAGE/step_N. Collective; returns the directory.

    Args:
        manifest: content of prolong.json without `step`.
        sidecar: the `hf/` directory that travels along.
        keep: how many of the stage's checkpoints to keep.
    """
    final = stage_dir / f"step_{step:08d}"
    partial = stage_dir / f"{final.name}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_weights_and_optimizer(partial, model, optimizer)
    dist.barrier()
    if is_main:
        shutil.copytree(sidecar, partial / "hf")
        (partial / MANIFEST).write_text(json.dumps({**manifest, "step": step}, indent=2) + "\n")
        _sync(partial)
        partial.rename(final)
        _write_pointer(stage_dir, final.name)
        _prune(stage_dir, keep)
    dist.barrier()
    return final


def _sync(directory: Path) -> None:
    """Push every file of the directory to the disk, so that the rename can only expose complete content."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_pointer(stage_dir: Path, name: str) -> None:
    temporary = stage_dir / "latest.partial"
    temporary.write_text(name + "\n")
    temporary.replace(stage_dir / "latest")


def _prune(stage_dir: Path, keep: int) -> None:
    complete = sorted(path for path in stage_dir.glob("step_*") if path.suffix != ".partial")
    for old in complete[:-keep]:
        shutil.rmtree(old)
    for leftover in stage_dir.glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)

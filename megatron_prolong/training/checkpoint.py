"""Save a training checkpoint: written aside, pushed to the disk, and only then named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.checkpoint import save_weights_and_optimizer
from megatron_prolong.mcore.optimizer import MegatronOptimizer
from megatron_prolong.runtime.checksums import CHECKSUMS, verify_checksums, write_checksums
from megatron_prolong.training.run_directory import MANIFEST, prune, write_pointer


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
        write_checksums(partial)
        _sync(partial)
        partial.rename(final)
        write_pointer(stage_dir, final.name)
        prune(stage_dir, keep)
    dist.barrier()
    return final


def verify_checkpoint(directory: Path) -> None:
    """Refuse a checkpoint with a changed, cut-off or missing file. Collective: the ranks share the reading.

    A converted checkpoint has no checksums (its weights were verified on the way) and is taken as it is.

    Raises:
        UserError: naming every damaged file.
    """
    if (directory / CHECKSUMS).exists():
        verify_checksums(directory, slice(dist.get_rank(), None, dist.get_world_size()))


def _sync(directory: Path) -> None:
    """Push every file of the directory to the disk, so that the rename can only expose complete content."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

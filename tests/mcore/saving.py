"""A checkpoint's tensors written at once, where a test wants no training around them."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.checkpoint import SaveStrategy, _model_state, take_snapshot, training_state
from megatron_prolong.mcore.optimizer import MegatronOptimizer


def save_weights_and_optimizer(
    directory: Path,
    model: StageModel,
    optimizer: MegatronOptimizer | None,
    strategy: SaveStrategy | None = None,
) -> None:
    """Write this rank's share into `directory`, which must exist and be empty. Collective."""
    state = training_state(model, optimizer) if optimizer else _model_state(model)
    snapshot = take_snapshot(directory, state, strategy or SaveStrategy())
    snapshot.write()
    dist.barrier()
    snapshot.finish()

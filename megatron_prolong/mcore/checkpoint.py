"""Weights and optimizer state to and from disk with Megatron's dist_checkpointing: any layout to any other.

A checkpoint directory holds Megatron's torch_dist files, `prolong.json` (what it is) and `hf/` (the tokenizer and
configs of the source, travelling along). Directories are written aside and renamed when complete.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer

from megatron_prolong.errors import UserError
from megatron_prolong.mcore.build import StageModel

# Adam moments are saved per weight, in the weight's own shape, so that any layout can read them back.
# Handed out as copies: Megatron writes the layout's process group into the dict it is given.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save_weights_and_optimizer(
    directory: Path, model: StageModel, optimizer: MegatronOptimizer | None
) -> None:
    """Write this rank's share into `directory`, which must exist and be empty. Collective."""
    state = _model_state(model)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=dict(_METADATA))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(state, str(directory), content_metadata=dict(_METADATA))


def load_weights(directory: Path, model: StageModel) -> None:
    """Load the weights of a checkpoint saved or converted at any layout. Collective.

    Raises:
        UserError: tensors are missing or of another shape than the model's.
    """
    _load_model(model, _read(directory, _model_state(model)))


def load_weights_and_optimizer(directory: Path, model: StageModel, optimizer: MegatronOptimizer) -> None:
    """Load weights, fp32 main weights and Adam moments (with their step count). Collective."""
    state = _model_state(model)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(_METADATA))
    loaded = _read(directory, state)
    _load_model(model, loaded)
    optimizer.load_state_dict(loaded["optimizer"])


def _model_state(model: StageModel) -> ShardedStateDict:
    chunks = model.bare_chunks
    states = [_without_extra_state(chunk.sharded_state_dict(metadata=dict(_METADATA))) for chunk in chunks]
    return {_chunk_key(index, len(chunks)): state for index, state in enumerate(states)}


def _chunk_key(index: int, num_chunks: int) -> str:
    return "model" if num_chunks == 1 else f"model{index}"


def _without_extra_state(state: ShardedStateDict) -> ShardedStateDict:
    """Drop the `_extra_state` objects: empty in native layers, FP8 scaling history (soon rebuilt) in TE's."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _read(directory: Path, state: ShardedStateDict) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dist_checkpointing.load(state, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    except dist_checkpointing.core.CheckpointingException as error:
        raise UserError(f"checkpoint {directory} does not fit this model: {error}") from error


def _load_model(model: StageModel, loaded: dict[str, Any]) -> None:
    chunks = model.bare_chunks
    for index, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[_chunk_key(index, len(chunks))], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)

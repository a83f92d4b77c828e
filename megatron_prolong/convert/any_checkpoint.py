"""A checkpoint of any kind (Hugging Face, ours, Megatron-LM's) seen as Hugging Face tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.convert.checkpoint import MegatronCheckpoint, open_weights
from megatron_prolong.convert.dist_weights import DistWeights
from megatron_prolong.convert.hf_weights import HFWeights
from megatron_prolong.convert.names import Rows, Tensor2D
from megatron_prolong.convert.transfer import Chunk, ChunkBuffer, gather, output_dtype
from megatron_prolong.recipe.shape import ModelShape, read_shape


@dataclass(frozen=True)
class AnyCheckpoint:
    """Shape and weights of a checkpoint directory, whatever its format."""

    directory: Path
    shape: ModelShape
    weights: HFWeights | DistWeights

    def dtype(self, tensor: Tensor2D) -> torch.dtype:
        """Stored dtype of a Hugging Face tensor."""
        if isinstance(self.weights, HFWeights):
            return self.weights.dtype(Rows(tensor.name, None, 0, 1))
        return output_dtype(tensor, self.weights, None)

    def read(self, tensor: Tensor2D, start: int, stop: int) -> Tensor:
        """Rows start … stop of a Hugging Face tensor, in its stored dtype, NaN and all."""
        chunk = Chunk(tensor, start, stop, self.dtype(tensor))
        if isinstance(self.weights, DistWeights):
            return gather(chunk, self.weights, ChunkBuffer(), finite=False)
        out = torch.empty(chunk.shape, dtype=chunk.dtype)
        self.weights.read_into(Rows(tensor.name, None, start, stop - start), out)
        return out


@contextlib.contextmanager
def open_checkpoint(directory: Path, sidecar: Path | None = None) -> Iterator[AnyCheckpoint]:
    """Open a checkpoint of any kind, its tensors checked against its config.

    Args:
        sidecar: as MegatronCheckpoint.open's.

    Raises:
        UserError: it is none, or is damaged.
    """
    if (directory / "config.json").exists():
        shape = read_shape(directory)
        weights: HFWeights | DistWeights = HFWeights(directory)
        weights.check(shape)
    else:
        checkpoint = MegatronCheckpoint.open(directory, sidecar)
        directory, shape, weights = checkpoint.directory, checkpoint.shape, open_weights(checkpoint)
    with contextlib.closing(weights):
        yield AnyCheckpoint(directory, shape, weights)

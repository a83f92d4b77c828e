"""Two checkpoints of any kind compared: tensor by tensor, and their shapes field by field."""

from __future__ import annotations

import concurrent.futures
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prolong.convert.any_checkpoint import AnyCheckpoint, open_checkpoint
from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.convert.names import Tensor2D, hf_tensors
from megatron_prolong.convert.transfer import WORKERS, chunks, num_bytes
from megatron_prolong.runtime.progress import progress


@dataclass(frozen=True)
class TensorDifference:
    """One Hugging Face tensor in both checkpoints."""

    name: str
    dtypes: tuple[str, str]
    exact: bool
    """Same dtype and same bits: 0 is not -0."""
    max_difference: float
    """Largest absolute difference, in fp32; NaN where a part that differs holds a NaN."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. `tensors` is empty when the sizes differ."""

    config: list[str]
    tensors: list[TensorDifference]

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not self.config and self.same_tensors

    @property
    def same_tensors(self) -> bool:
        """Every tensor is there with the same numbers."""
        return bool(self.tensors) and all(tensor.exact for tensor in self.tensors)

    def lines(self) -> list[str]:
        """The result in words."""
        inexact = [tensor for tensor in self.tensors if not tensor.exact]
        lines = [f"config: {line}" for line in self.config]
        lines += [
            f"{tensor.name}: {' and '.join(sorted(set(tensor.dtypes)))},"
            f" largest difference {tensor.max_difference:g}"
            for tensor in inexact
        ]
        exact = len(self.tensors) - len(inexact)
        lines.append(
            f"{exact} of {len(self.tensors)} tensors are bit-equal, {len(self.config)} config differences"
        )
        return lines


def compare(a: Path, b: Path, *, cast: bool = False) -> Comparison:
    """Compare two checkpoint directories of any kind.

    Args:
        cast: compare `a` as it is in `b`'s dtypes: whether `b` is a faithful conversion to another dtype.

    Raises:
        UserError: one of them is not a checkpoint, or is damaged.
    """
    # Megatron-LM may know only its padded vocabulary: the other checkpoint tells the real one.
    with open_checkpoint(a, b) as left, open_checkpoint(b, a) as right:
        # initializer_range is no part of what a model computes, and Megatron-LM has a default of its own.
        fields, others = left.shape.to_dict(), right.shape.to_dict()
        config = [
            f"{name}: {fields[name]} in {a}, {others[name]} in {b}"
            for name in fields
            if fields[name] != others[name] and name != "initializer_range"
        ]
        if hf_tensors(left.shape) != hf_tensors(right.shape):
            return Comparison(config, [])  # other names, or rows in other places
        return Comparison(config, _compare_tensors(left, right, cast))


def _compare_tensors(left: AnyCheckpoint, right: AnyCheckpoint, cast: bool) -> list[TensorDifference]:
    tensors = hf_tensors(left.shape)
    total = sum(num_bytes(tensor, left.dtype(tensor)) for tensor in tensors)
    with progress("comparing", total, in_bytes=True) as advance:

        def one(tensor: Tensor2D) -> TensorDifference:
            difference = _compare_tensor(tensor, left, right, cast)
            advance(num_bytes(tensor, left.dtype(tensor)))
            return difference

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(one, tensors))


def _compare_tensor(
    tensor: Tensor2D, left: AnyCheckpoint, right: AnyCheckpoint, cast: bool
) -> TensorDifference:
    exact, largest = True, torch.zeros(())
    dtypes = (right.dtype(tensor) if cast else left.dtype(tensor), right.dtype(tensor))
    for chunk in chunks(tensor, left.dtype(tensor)):
        mine = left.read(tensor, chunk.start, chunk.stop).to(dtypes[0])
        other = right.read(tensor, chunk.start, chunk.stop)
        if mine.dtype == other.dtype and torch.equal(mine.view(torch.uint8), other.view(torch.uint8)):
            continue
        exact = False
        difference = (mine.float() - other.float()).abs().max()
        largest = torch.maximum(largest, difference)  # a NaN wins
    return TensorDifference(
        tensor.name, (dtype_name(dtypes[0]), dtype_name(dtypes[1])), exact, float(largest)
    )

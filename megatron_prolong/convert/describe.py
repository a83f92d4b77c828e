"""What a checkpoint of any kind holds, in lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_prolong.convert.checkpoint import MegatronCheckpoint
from megatron_prolong.convert.dist_weights import DistWeights
from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.convert.hf_weights import HFWeights
from megatron_prolong.recipe.shape import read_shape


def describe(directory: Path) -> Iterator[str]:
    """Kind, step, layout and shape, then every tensor.

    Raises:
        UserError: not a checkpoint, or a damaged one.
    """
    if (directory / "config.json").exists():
        yield f"{directory}: Hugging Face checkpoint"
        yield from _shape_lines(read_shape(directory).to_dict())
        yield from _tensor_lines(HFWeights(directory).listing())
        return
    checkpoint = MegatronCheckpoint.open(directory)
    yield f"{checkpoint.directory}: Megatron checkpoint ({checkpoint.kind})"
    for name in ("stage", "step", "sequence_length", "dtype", "layout", "versions"):
        if checkpoint.about.get(name) is not None:
            yield f"  {name}: {json.dumps(checkpoint.about[name])}"
    yield from _shape_lines(checkpoint.shape.to_dict())
    yield from _tensor_lines(DistWeights(checkpoint.directory).listing())


def _shape_lines(fields: dict[str, object]) -> Iterator[str]:
    for name, value in fields.items():
        yield f"  {name}: {value}"


def _tensor_lines(listing: list[tuple[str, tuple[int, ...], torch.dtype, int]]) -> Iterator[str]:
    width = max((len(name) for name, *_ in listing), default=0)
    total = 0
    for name, shape, dtype, chunks in listing:
        total += math.prod(shape) * dtype.itemsize
        pieces = f"  {chunks} chunks" if chunks > 1 else ""
        yield f"  {name:{width}}  {dtype_name(dtype):8}  {list(shape)}{pieces}"
    yield f"  {len(listing)} tensors, {total / 1e9:.3f} GB"

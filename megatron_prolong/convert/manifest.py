"""prolong.json: what a checkpoint directory says about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_prolong.convert.dtypes import dtype_name
from megatron_prolong.recipe.shape import MANIFEST, ModelShape
from megatron_prolong.runtime.packages import version_of

_PACKAGES = ("megatron-prolong", "megatron-core", "torch", "transformer-engine", "flash-attn", "flash-attn-3")
_NEVER_TRAINED = {"stage": None, "step": 0, "sequence_length": None, "layout": None}


def manifest(
    shape: ModelShape, dtype: torch.dtype, trained: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Content of the file; `recipe.shape.read_manifest` reads it.

    Args:
        trained: stage, step, sequence_length, layout and training (the TrainState) of a training's checkpoint;
            None for weights that were never trained here.
    """
    return {
        "format": 1,
        "kind": "training" if trained else "weights",
        "shape": shape.to_dict(),
        "dtype": dtype_name(dtype),
        **(trained or _NEVER_TRAINED),
        "versions": versions(),
    }


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Into a checkpoint that nobody reads yet."""
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Of the packages that make the numbers, those that are installed."""
    found = {name: version_of(name) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version is not None}

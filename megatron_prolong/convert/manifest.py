"""prolong.json: what a checkpoint directory says about itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from megatron_prolong.recipe.shape import MANIFEST, ModelShape


def write_weights_manifest(directory: Path, shape: ModelShape, dtype: str) -> None:
    """The manifest of a checkpoint that holds weights and was never trained here."""
    content = {
        "format": 1,
        "kind": "weights",
        "shape": shape.to_dict(),
        "dtype": dtype,
        "stage": None,
        "step": 0,
        "sequence_length": None,
        "layout": None,
        "versions": {name: version(name) for name in ("megatron-prolong", "torch")},
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

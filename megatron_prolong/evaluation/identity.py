"""Which weights a directory holds, without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_prolong.recipe.shape import MANIFEST

WEIGHTS = ("*.safetensors", "*.distcp", "config.json", MANIFEST)


def model_identity(directory: Path) -> str:
    """Changes when the weights in the directory are written anew: names, sizes and times of the files."""
    files = sorted({file for pattern in WEIGHTS for file in directory.glob(pattern)})
    text = "\n".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

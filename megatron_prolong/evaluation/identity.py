"""Which model a directory holds, and which data a task reads, without reading what is large."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megatron_prolong.evaluation.backend import tokenizer_directory
from megatron_prolong.evaluation.task import Task
from megatron_prolong.recipe.shape import MANIFEST, TOKENIZER_FILES

WEIGHTS = ("*.safetensors", "*.distcp", MANIFEST)
# How prompts are written and where answers end; small, and hand-edited.
WORDS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def model_identity(directory: Path) -> str:
    """Changes when weights are written anew (names, sizes, times) or tokenizer, template or stop ids change."""
    weights = _identity({file.name: file for pattern in WEIGHTS for file in directory.glob(pattern)})
    source = tokenizer_directory(directory)
    words = sorted({file for pattern in WORDS for file in source.glob(pattern) if file.is_file()})
    contents = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in words]
    return hashlib.sha256("\n".join([weights, *contents]).encode("utf-8")).hexdigest()[:16]


def data_identity(task: Task, data: Path | None) -> str:
    """Changes when a file that the task reads does, wherever `data` lies; empty when the task makes its rows."""
    if data is None or not (places := task.files(data)):
        return ""
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    return _identity({file.relative_to(data).as_posix(): file for file in files})


def directory_identity(directory: Path) -> str:
    """Changes when a file in it does, wherever it lies."""
    files = [file for file in directory.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return _identity({file.relative_to(directory).as_posix(): file for file in files})


def _identity(files: Mapping[str, Path]) -> str:
    stats = [(name, file.stat()) for name, file in sorted(files.items())]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

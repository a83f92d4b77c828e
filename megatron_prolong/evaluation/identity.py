"""Which model a directory holds, and which data a task reads, without reading what is large."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

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


def tasks_identity(directory: Path) -> str:
    """Changes when a file in it does, wherever it lies, or one that its YAML names, as those of a task's data."""
    files = [file for file in directory.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    named = {name: Path(name) for file in files if file.suffix == ".yaml" for name in _files_named(file)}
    return _identity({**named, **{file.relative_to(directory).as_posix(): file for file in files}})


def _files_named(file: Path) -> Iterator[str]:
    with suppress(yaml.YAMLError):  # the harness does not read it either
        for event in yaml.parse(file.read_bytes()):
            # Path.is_file raises for a prompt, which is too long for a name.
            if isinstance(event, yaml.ScalarEvent) and os.path.isfile(event.value):  # noqa: PTH113
                yield event.value


def _identity(files: Mapping[str, Path]) -> str:
    stats = [(name, file.stat()) for name, file in sorted(files.items())]
    text = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]

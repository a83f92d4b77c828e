"""A model of two layers, and the checkpoint that it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import save_family

from megatron_prolong.convert.to_megatron import to_megatron


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return save_family("llama3", tmp_path / "original")


@pytest.fixture
def converted(original: Path, tmp_path: Path) -> Path:
    to_megatron(original, tmp_path / "converted")
    return tmp_path / "converted"

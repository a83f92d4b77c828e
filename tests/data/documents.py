"""Small tokenized data sets and sources for the tests of this room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSWriter

COLUMNS = {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}


def tokens_of(number: int, length: int) -> NDArray[np.uint32]:
    """Tokens that tell where they are from: document number · 1000 + position."""
    return (number * 1000 + np.arange(length)).astype(np.uint32)


def mask_of(number: int, length: int) -> NDArray[np.uint8]:
    return ((np.arange(length) + number) % 3 == 0).astype(np.uint8)


def write_documents(
    path: Path,
    lengths: Sequence[int],
    *,
    first: int = 1,
    mask: bool = False,
    domain: str = "d",
    size_limit: int = 1 << 26,
) -> Path:
    columns = COLUMNS | ({"mask": "ndarray:uint8"} if mask else {})
    with MDSWriter(path, columns, size_limit=size_limit) as writer:
        for number, length in enumerate(lengths, first):
            sample = {"input_ids": tokens_of(number, length), "length": length, "domain": domain}
            writer.write(sample | ({"mask": mask_of(number, length)} if mask else {}))
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below `path`, to compare directories byte for byte."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }

"""Whole-file compression of shards: `zstd`, `gz` and `bz2`, optionally with a level as in `zstd:9`."""

from __future__ import annotations

import bz2
import gzip
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_prolong.errors import UserError

KNOWN = ("zstd", "gz", "bz2")


def parse_compression(name: str) -> tuple[str, int | None]:
    """`zstd:9` to ("zstd", 9); the first part is also the file name's extension. Raises UserError."""
    algorithm, _, level = name.partition(":")
    if algorithm not in KNOWN or (level and not level.isdigit()):
        raise UserError(f"compression {name!r} is not supported; known: {', '.join(KNOWN)} (zstd:3)")
    return algorithm, int(level) if level else None


def open_compressed(path: Path, algorithm: str) -> AbstractContextManager[Any]:
    """The file's uncompressed bytes as a binary stream."""
    if algorithm == "zstd":
        return zstandard.open(path, "rb")
    return gzip.open(path, "rb") if algorithm == "gz" else bz2.open(path, "rb")


def compressed_writer(file: IO[bytes], name: str, num_bytes: int) -> AbstractContextManager[Any]:
    """A stream that compresses into `file` (left open). num_bytes: the total, which zstd's readers want
    in the frame's header."""
    algorithm, level = parse_compression(name)
    if algorithm == "zstd":
        compressor = zstandard.ZstdCompressor(level=3 if level is None else level)
        return compressor.stream_writer(file, size=num_bytes, closefd=False)
    level = 9 if level is None else level
    if algorithm == "gz":
        # No time stamp and no name, so that equal data gives equal files.
        return gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0)
    return bz2.BZ2File(file, "wb", compresslevel=level)

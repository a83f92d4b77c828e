"""Checksums of a checkpoint's files: a byte that changed on disk is noticed before it is trained on.

`checksums.json` in the directory maps each file's path to its size and its XXH3-128 hash. It guards against
accident (a bad disk, a cut-off copy), not against malice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import xxhash

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import write_durably

CHECKSUMS = "checksums.json"
_CHUNK_BYTES = 4 << 20
_THREADS = 8  # hashing and reading release the GIL

Entries = dict[str, list[int | str]]


class HashingFile:
    """A file being written that keeps the hash of what goes into it, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._size = file, xxhash.xxh3_128(), 0

    def write(self, content: bytes | memoryview) -> int:
        """Append `content`."""
        self._digest.update(content)
        self._size += memoryview(content).nbytes
        return self._file.write(content)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    @property
    def entry(self) -> list[int | str]:
        """[bytes, hash]."""
        return [self._size, self._digest.hexdigest()]


def hash_files(directory: Path, names: Iterable[str]) -> Entries:
    """path → [bytes, hash] of the named files."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(directory / name), names), strict=True))


def write_checksums(directory: Path, known: Mapping[str, list[int | str]] = MappingProxyType({})) -> None:
    """Write checksums.json for every file under `directory`, synced to disk.

    Args:
        known: entries of files that were hashed while they were written; the others are read here.
    """
    entries = {**known, **hash_files(directory, [name for name in _files(directory) if name not in known])}
    content = {"algorithm": "xxh3_128", "files": dict(sorted(entries.items()))}
    write_durably(directory / CHECKSUMS, json.dumps(content, indent=1))


def verify_checksums(directory: Path, share: slice = slice(None)) -> None:
    """Compare every file with checksums.json.

    Args:
        share: of the files in order of their names, so that ranks can divide the reading: slice(rank, None, size).

    Raises:
        UserError: with every file that is missing, of another size, changed, or not in the list.
    """
    recorded, present = _read(directory), set(_files(directory))
    problems = [f"{name}: not in {CHECKSUMS}" for name in present - recorded.keys()]
    problems += [f"{name}: missing" for name in recorded.keys() - present]
    names = sorted(recorded.keys() & present)[share]
    for name, (size, digest) in hash_files(directory, names).items():
        expected_size, expected_digest = recorded[name]
        if size != expected_size:
            problems.append(f"{name}: {size} bytes, written as {expected_size}")
        elif digest != expected_digest:
            problems.append(f"{name}: contents changed since it was written")
    if problems:
        raise UserError.many(
            f"{directory} is damaged; copy it again, or use an older checkpoint (its name goes into "
            f"{directory.with_name('latest')}):",
            sorted(problems),
        )


def _read(directory: Path) -> Entries:
    path = directory / CHECKSUMS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        algorithm, files = content["algorithm"], content["files"]
        entries: Entries = {str(name): [int(size), str(digest)] for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}); copy it again, or use an older checkpoint"
        ) from error
    if algorithm != "xxh3_128":
        raise UserError(f"{path}: unknown algorithm {algorithm!r}, expected xxh3_128")
    return entries


def _files(directory: Path) -> list[str]:
    """Paths below `directory`, but for the checksums themselves (and a half-written list of them).

    Asks the file server for directories only, not for each file: every one of 512 ranks lists the files of all.
    """
    paths = (Path(parent, name) for parent, _, files in os.walk(directory) for name in files)
    names = sorted(path.relative_to(directory).as_posix() for path in paths)
    return [name for name in names if not name.startswith(CHECKSUMS)]


def _hash(path: Path) -> list[int | str]:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]

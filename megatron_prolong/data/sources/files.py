"""Listing and opening files, here or behind a URL (`s3://`, `gs://`, `hf://`, …) through fsspec."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

import zstandard

from megatron_prolong.errors import UserError

COMPRESSED = (".gz", ".zst", ".zstd", ".bz2")


def is_remote(path: str) -> bool:
    return "://" in path


def refuse_repeated(paths: Iterable[str]) -> None:
    """Raises UserError when two of them are one file, or one directory, by whatever names."""
    seen: dict[str, str] = {}
    real_directory = cache(os.path.realpath)  # corpora have millions of files in few directories
    for path in paths:
        head, name = os.path.split(path)
        if is_remote(path):
            real = path
        elif name in ("", ".", "..") or Path(path).is_symlink():
            real = os.path.realpath(path)
        else:
            real = str(Path(real_directory(head), name))
        if real in seen:
            raise UserError(
                f"{seen[real]} and {path} are the same, whose documents would be taken twice; leave one out (how "
                "often data is seen is said in a recipe's mixture)"
            )
        seen[real] = path


def list_files(path: str, suffixes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, bytes) of `path` itself if it is a file, else of all files below it with one of the suffixes
    (a compression's suffix may follow), sorted by path. Hidden files are left out; others too, with a warning: a
    source tree with a README would pass for texts.

    Raises UserError when `path` does not exist or holds no such file.
    """
    found = _list_remote(path) if is_remote(path) else _list_local(path)
    if len(found) == 1 and found[0][0] == path:
        return found
    endings = tuple(suffix + zipped for suffix in suffixes for zipped in ("", *COMPRESSED))
    files = [(name, size) for name, size in found if name.lower().endswith(endings)]
    if not files:
        raise UserError(
            f"{path}: no file ends in {', '.join(suffixes)} (found {len(found)} other files, which have to "
            "be named one by one)"
        )
    if others := sorted({name for name, _ in found} - {name for name, _ in files}):
        warn(f"{path}: files of other kinds are passed over ({len(others):,}, such as {others[0]})")
    return sorted(files)


@cache
def warn(message: str) -> None:
    """Once by each process: evaluation sets are listed to tell a job from others, and to be read."""
    print(f"warning: {message}", file=sys.stderr)


def _list_local(path: str) -> list[tuple[str, int]]:
    root = Path(path)
    if root.is_file():
        return [(path, root.stat().st_size)]
    if not root.is_dir():
        raise UserError(f"{path}: no such file or directory")
    found: list[tuple[str, int]] = []
    for directory, names, files in os.walk(path, onerror=refuse_unreadable):
        names[:] = [name for name in names if not name.startswith(".")]
        for link in filter(Path.is_symlink, (Path(directory, name) for name in names)):
            warn(f"{link}: a link to a directory is not followed; name it beside {path}")
        for file in (Path(directory, name) for name in files if not name.startswith(".")):
            try:
                state = file.stat()
            except FileNotFoundError:  # a link to nothing: refused when it is to be read
                found.append((str(file), 0))
            else:
                if stat.S_ISREG(state.st_mode):
                    found.append((str(file), state.st_size))
    return found


def refuse_unreadable(error: OSError) -> NoReturn:
    """What os.walk would pass over in silence."""
    raise _unreadable(error.filename, error) from None


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}); let it be read, or move it away")


def _list_remote(path: str) -> list[tuple[str, int]]:
    system, inner = _filesystem(path)
    try:
        if system.isfile(inner):
            return [(path, int(system.size(inner) or 0))]
        details = system.find(inner, detail=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not details:
        raise UserError(f"{path}: nothing there")
    return [
        (system.unstrip_protocol(name), int(info.get("size") or 0))
        for name, info in details.items()
        if "/." not in name.removeprefix(inner)
    ]


def _filesystem(path: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{path}: {error}; remote paths need fsspec and the protocol's driver (s3fs, gcsfs, …)"
        ) from None


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix (.gz, .zst, .zstd, .bz2), for sequential reading.

    Raises UserError naming the file when it may not be read, or cannot be read to its end: damaged, cut short, out
    of reach.
    """
    try:
        with _open(path) as raw, _decompressed(path, raw) as file:
            yield file
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); fetch it again") from None


def _open(path: str) -> IO[bytes]:
    if not is_remote(path):
        return Path(path).open("rb")
    system, inner = _filesystem(path)
    file: IO[bytes] = system.open(inner, "rb")
    return file


def _decompressed(path: str, raw: IO[bytes]) -> IO[bytes]:
    name = path.lower()
    if name.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if name.endswith((".zst", ".zstd")):
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return bz2.open(raw) if name.endswith(".bz2") else raw


class _ZstdStream(io.RawIOBase):
    """Frame after frame. The library's own stream takes a file that was cut short for one that is complete."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        # Long-range windows up to 2 GiB occur in published JSONL.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(1 << 14)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

"""Random access to the samples of an MDS data set through memory maps.

Opening reads index.json only. A shard is mapped when one of its samples is asked for, and the last of them stay
mapped, as many as open files are allowed (a map costs address space and a file descriptor, not memory); arrays are
views of the map and keep it. A compressed shard is unpacked once, by one of the processes that want it, beside the
compressed file as the format's own reader does; when the directory is read-only, by each into an unnamed temporary
file, which is gone when it is no longer mapped.
"""

from __future__ import annotations

import fcntl
import mmap
import operator
import os
import struct
import tempfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from megatron_prolong.data.mds.compression import open_compressed, parse_compression
from megatron_prolong.data.mds.encodings import Decode, encoding
from megatron_prolong.data.mds.index import Shard, check_hashes, read_index
from megatron_prolong.errors import PassingError, UserError
from megatron_prolong.runtime.open_files import allow_open_files
from megatron_prolong.runtime.passing import is_passing
from megatron_prolong.runtime.publish import no_room, temporary_name

_PAIR = struct.Struct("<II")
_CHUNK_BYTES = 1 << 20
# A reader's share of the open files, as a mixture has many domains and gloo a socket to every rank. Hundreds of
# ranks that open a shard for every sample anew are a burden to the file server.
_SHARE_OF_OPEN_FILES = 64
_MAX_MAPS = 1024
_MAX_UNNAMED = 64
"""Shards unpacked into unnamed files that stay mapped: 4 GiB of the temporary directory, however large the data."""


class MDSReader(Sequence[dict[str, Any]]):
    """`reader[i]` is sample i as {column: value}; arrays are read-only views, copy them to keep or change.

    path: directory with index.json. columns: read only these, as far as they are there (default all, and of a type
    that is not known here the bytes that are stored). Hashes are compared when a compressed shard is unpacked, and
    by `verify`.
    Raises UserError naming file, sample and column for a missing or damaged file, and for one of `columns` whose
    type is not known.
    """

    def __init__(self, path: Path | str, *, columns: Iterable[str] | None = None) -> None:
        self._max_maps = max(1, min(_MAX_MAPS, allow_open_files() // _SHARE_OF_OPEN_FILES))
        self.path = Path(path)
        index = read_index(self.path)
        self.shards = index.shards
        self.tokenizer = index.tokenizer
        self._starts = [shard.first for shard in self.shards]
        self._length = sum(shard.num_samples for shard in self.shards)
        self._maps: dict[int, mmap.mmap] = {}  # oldest first
        stored = self.shards[0].columns if self.shards else {}
        wanted = stored.keys() if columns is None else set(columns)
        self.columns = {name: kind for name, kind in stored.items() if name in wanted}
        self._layout = self._plan(must_decode=columns is not None)
        self._sizes = struct.Struct(f"<{sum(size is None for _, size, _ in self._layout)}I")
        self._fixed_bytes = self._sizes.size + sum(size or 0 for _, size, _ in self._layout)

    def _plan(self, must_decode: bool) -> list[tuple[str, int | None, Decode | None]]:
        """(name, fixed size, decoder or None to skip) of every stored column, in the order of the file."""
        layout: list[tuple[str, int | None, Decode | None]] = []
        for name, kind in self.shards[0].columns.items() if self.shards else ():
            try:
                known = encoding(kind)
            except UserError as error:
                if must_decode and name in self.columns:
                    raise UserError(f"{self.path}, column {name}: {error}") from None
                known = replace(encoding("bytes"), size=self.shards[0].sizes[name])
            layout.append((name, known.size, known.decode if name in self.columns else None))
        return layout

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, shard in enumerate(self.shards):
            for sample in range(shard.num_samples):
                yield self._read(number, sample)

    def __getitem__(self, index: Any) -> Any:
        """Sample `index` (negative counts from the end). Raises IndexError beyond the end."""
        wanted = operator.index(index)
        position = wanted + self._length if wanted < 0 else wanted
        if not 0 <= position < self._length:
            raise IndexError(f"{self.path}: sample {wanted} of {self._length}")
        number = bisect_right(self._starts, position) - 1
        return self._read(number, position - self._starts[number])

    def shard_of(self, index: int) -> Shard:
        """The shard that holds sample `index` >= 0."""
        return self.shards[bisect_right(self._starts, index) - 1]

    def _read(self, number: int, sample: int) -> dict[str, Any]:
        data = self._maps.get(number)
        if data is None:
            data = self._map(number)
        column = "sizes"
        try:
            begin, end = _PAIR.unpack_from(data, 4 + 4 * sample)
            sizes = self._sizes.unpack_from(data, begin)
            columns_end = begin + self._fixed_bytes + sum(sizes)
            if columns_end != end or end > len(data):
                raise ValueError(
                    f"columns end at byte {columns_end}, the sample at {end}, the file at {len(data)}"
                )
            at = begin + self._sizes.size
            varying = iter(sizes)
            values: dict[str, Any] = {}
            for column, fixed, decode in self._layout:
                size = next(varying) if fixed is None else fixed
                if decode is not None:
                    values[column] = decode(data, at, size)
                at += size
        except (ValueError, KeyError, IndexError, struct.error) as error:
            shard = self.shards[number]
            raise UserError(
                f"{shard.path}, sample {sample} (number {shard.first + sample} of {self.path}), "
                f"column {column}: {error}; the shard is damaged, fetch or write it again"
            ) from None
        return values

    def array_lengths(self, column: str, number: int) -> NDArray[np.int64]:
        """Elements of a column of one-axis arrays in every sample of shard `number`, int64 [samples].

        Some twenty times faster than reading the samples. Raises UserError for a damaged shard, and when the
        column's type does not name a dtype, or an array has more axes.
        """
        _, _, dtype = self.columns[column].partition(":")
        data = np.frombuffer(self._maps.get(number) or self._map(number), np.uint8)
        try:
            offsets = np.frombuffer(data, "<u4", self.shards[number].num_samples + 1, 4).astype(np.int64)
            begins, ends = offsets[:-1], offsets[1:]
            at, num_varying = begins + self._sizes.size, 0
            for name, fixed, _ in self._layout:
                if fixed is None:
                    size = data[(begins + 4 * num_varying)[:, None] + np.arange(4)].view("<u4")[:, 0]
                    num_varying += 1
                if name == column:
                    break
                at += size if fixed is None else fixed
            num_axes, head = data[at] >> 2, 1 + (1 << (data[at] & 3).astype(np.int64))
            lengths, rest = np.divmod(size - head, np.dtype(dtype).itemsize)
            if (num_axes == 1).all() and not rest.any() and (at + size <= ends).all():
                return lengths
        except (ValueError, IndexError):
            pass
        self.verify(number)
        raise UserError(f"{self.shards[number].path}: column {column} has arrays of more than one axis")

    def _map(self, number: int) -> mmap.mmap:
        shard = self.shards[number]
        with _open(shard) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if int.from_bytes(data[:4], "little") != shard.num_samples:
            raise UserError(
                f"{shard.path} holds {int.from_bytes(data[:4], 'little')} samples, index.json says "
                f"{shard.num_samples}; fetch or write the data set again"
            )
        is_named = shard.packed is None or shard.path.exists()
        if len(self._maps) >= (self._max_maps if is_named else min(self._max_maps, _MAX_UNNAMED)):
            del self._maps[next(iter(self._maps))]
        self._maps[number] = data
        return data

    def verify(self, number: int) -> None:
        """Check shard `number` completely: size, hashes, and that every sample decodes. Raises UserError."""
        shard = self.shards[number]
        path, file = shard.delivered
        _open_file(path, file.num_bytes).close()
        check_hashes(path, file.hashes, _parts(path))
        for sample in range(shard.num_samples):
            self._read(number, sample)
        if shard.packed is not None and shard.path.exists():  # unpacked earlier; this is what gets read
            check_hashes(shard.path, shard.raw.hashes, _parts(shard.path))


def _open(shard: Shard) -> IO[bytes]:
    """The shard as it is read, unpacked if need be."""
    if shard.packed is None:
        return _open_file(shard.path, shard.raw.num_bytes)
    if not _has_size(shard.path, shard.raw.num_bytes):
        with _alone(shard.delivered[0]):  # all ranks read the same batch, so they come at the same moment
            if not _has_size(shard.path, shard.raw.num_bytes):
                return _unpack(shard)
    return _open_file(shard.path, shard.raw.num_bytes)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for other processes that are here with the same file; where it cannot be locked, each does its work."""
    with ExitStack() as stack:
        with suppress(OSError):
            file = stack.enter_context(path.open("r+b"))  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_there(shard: Shard) -> bool:
    """Whether the shard can be read, as far as the sizes of its files tell."""
    path, file = shard.delivered
    return _has_size(path, file.num_bytes) or _has_size(shard.path, shard.raw.num_bytes)


def is_unpacked_by_all(shard: Shard) -> bool:
    """Whether each process that reads the shard must unpack it for itself, as nothing can be written beside it."""
    is_packed = shard.packed is not None and not _has_size(shard.path, shard.raw.num_bytes)
    return is_packed and not os.access(shard.path.parent, os.W_OK)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.exists() and path.stat().st_size == num_bytes


def _open_file(path: Path, num_bytes: int) -> IO[bytes]:
    """The file server is asked once."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: this shard is missing; fetch or write the data set again") from None
    found = os.fstat(file.fileno()).st_size
    if found != num_bytes:
        file.close()
        what = "truncated" if found < num_bytes else "too long"
        raise UserError(
            f"{path}: {what}, {found} bytes where index.json says {num_bytes}; fetch or write it again"
        )
    return file


def _parts(path: Path) -> Iterator[memoryview]:
    """The file in pieces, each valid until the next is asked for; not mapped, so that a bad disk is an error."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _unpack(shard: Shard) -> IO[bytes]:
    """Decompress a shard, check what comes out against the index, return it opened for reading."""
    path, file = shard.delivered
    _open_file(path, file.num_bytes).close()
    temporary = temporary_name(shard.path)
    try:
        raw: IO[bytes] = temporary.open("w+b")
    except OSError:
        # A read-only place: unpack into a file that vanishes with this process.
        raw = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        _decompress(shard, raw, Path(tempfile.gettempdir()))
        return raw
    try:
        _decompress(shard, raw, shard.path)
        temporary.replace(shard.path)
    except BaseException:
        raw.close()
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return raw


def _decompress(shard: Shard, raw: IO[bytes], place: Path) -> None:
    """place: where `raw` lies, for messages."""
    path, _ = shard.delivered
    try:
        algorithm, _ = parse_compression(shard.compression or "")
    except UserError as error:
        raise UserError(f"{path}: {error}; write the data set again with one of these") from None
    try:
        with open_compressed(path, algorithm) as stream:
            while part := stream.read(_CHUNK_BYTES):
                raw.write(part)
        raw.flush()
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        if why := no_room(error):
            raise UserError(
                f"{place}: {why}; {path.name} takes {shard.raw.num_bytes:,} bytes unpacked. Free space "
                "and run the same command again"
            ) from None
        if is_passing(error):
            raise PassingError(f"{path}: cannot be unpacked now ({error}); start again") from error
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch or write it again") from None
    if raw.tell() != shard.raw.num_bytes:
        raise UserError(f"{path} unpacks to {raw.tell()} bytes, index.json says {shard.raw.num_bytes}")
    raw.seek(0)
    check_hashes(shard.path, shard.raw.hashes, iter(lambda: raw.read(_CHUNK_BYTES), b""))

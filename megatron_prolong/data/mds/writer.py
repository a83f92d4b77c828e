"""Writing an MDS data set, atomically: it appears under its name only when it is complete.

Given the same samples and options the shard files are byte for byte those of the format's own writer
(except compressed ones, which only unpack to the same bytes). At most one shard is held in memory.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_prolong.data.mds.compression import compressed_writer, parse_compression
from megatron_prolong.data.mds.encodings import encoding
from megatron_prolong.data.mds.index import INDEX, hash_parts, hasher, index_text
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import no_room, publish, refuse_url, temporary_name

HASHES = ("xxh64",)
"""Recorded by default, so that a flipped bit is found: 0.1 ms per MiB, a tenth of what packing it takes."""
SHARD_BYTES = 1 << 26
"""Default size limit of a shard, 64 MiB, as in the data ProLong published."""
_MAX_SHARD_BYTES = (1 << 32) - 1  # offsets are uint32


class MDSWriter:
    """Use as a context manager; leaving it without an exception renames the finished directory into place.

    columns: name to MDS encoding. size_limit: bytes of an uncompressed shard; a single larger sample gets
    a shard of its own. compression: None, `zstd[:level]`, `gz[:level]`, `bz2[:level]`. hashes: names such as
    `xxh64` or `sha1`, recorded for every file; none is the default of the format's own writer.
    tokenizer: fingerprint of the one that made the tokens, recorded in the index.
    Raises UserError when `path` exists and is not an empty directory, when a value does not fit its column
    (naming column and sample), when a sample exceeds the format's 4 GiB, and when the disk is full.
    """

    def __init__(
        self,
        path: Path | str,
        columns: Mapping[str, str],
        *,
        size_limit: int = SHARD_BYTES,
        compression: str | None = None,
        hashes: Sequence[str] = HASHES,
        tokenizer: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.num_samples = 0
        refuse_existing(self.path)
        if not 0 < size_limit <= _MAX_SHARD_BYTES:
            raise UserError(f"shard size limit {size_limit} is not within 1 and {_MAX_SHARD_BYTES} bytes")
        self._encodings = {name: encoding(columns[name]) for name in sorted(columns)}
        self._sizes = struct.Struct(f"<{sum(each.size is None for each in self._encodings.values())}I")
        self._extension = f".{parse_compression(compression)[0]}" if compression else ""
        for algorithm in hashes:
            hasher(algorithm)
        self._settings: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": sorted(hashes),
            "size_limit": size_limit,
            "column_names": list(self._encodings),
            "column_encodings": [each.name for each in self._encodings.values()],
            "column_sizes": [each.size for each in self._encodings.values()],
        }
        self._head = json.dumps(self._settings, sort_keys=True).encode()
        self._limit = size_limit
        self._shards: list[dict[str, Any]] = []
        self._buffer = _buffer(min(size_limit, SHARD_BYTES))
        self._clear()
        self._temporary = temporary_name(self.path)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _clear(self) -> None:
        self._ends = [0]
        self._num_bytes = 8 + len(self._head)

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample; its keys must be exactly the columns."""
        if sample.keys() != self._encodings.keys():
            raise UserError(
                f"{self.path}, sample {self.num_samples}: has the columns {sorted(sample)}, "
                f"expected {sorted(self._encodings)}"
            )
        parts = self._encode(sample)
        num_bytes = sum(map(len, parts))
        if self._num_bytes + num_bytes + 4 > self._limit and self._ends[-1]:
            self._flush()
        if self._num_bytes + num_bytes + 4 > _MAX_SHARD_BYTES:
            raise UserError(
                f"{self.path}, sample {self.num_samples}: {num_bytes} bytes do not fit into the MDS format's "
                "4 GiB shards; split the document"
            )
        end = self._ends[-1]
        if end + num_bytes > len(self._buffer):
            larger = _buffer(max(end + num_bytes, 2 * len(self._buffer)))
            larger[:end] = self._buffer[:end]
            self._buffer = larger
        for part in parts:
            start, end = end, end + len(part)
            self._buffer[start:end] = part
        self._ends.append(end)
        self._num_bytes += num_bytes + 4
        self.num_samples += 1

    def _encode(self, sample: Mapping[str, Any]) -> list[bytes | memoryview]:
        sizes: list[int] = []
        values: list[bytes | memoryview] = []
        for name, each in self._encodings.items():
            try:
                value = each.encode(sample[name])
            except (TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{self.path}, sample {self.num_samples}, column {name} ({each.name}): {error}"
                ) from None
            values += value
            if each.size is None:
                sizes.append(sum(map(len, value)))
        return [self._sizes.pack(*sizes), *values]

    def _shard_parts(self) -> Iterator[bytes | memoryview]:
        count = len(self._ends) - 1
        yield np.array([count], "<u4").tobytes()
        yield (np.array(self._ends) + 4 + 4 * (count + 1) + len(self._head)).astype("<u4").tobytes()
        yield self._head
        yield self._buffer[: self._ends[-1]]

    def _flush(self) -> None:
        raw_name = f"shard.{len(self._shards):05}.mds"
        name = raw_name + self._extension
        path = self._temporary / name
        with disk_full_is_users(self.path), path.open("wb") as file:
            compression = self._settings["compression"]
            packer = (
                compressed_writer(file, compression, self._num_bytes) if compression else nullcontext(file)
            )
            with packer as stream:
                for part in self._shard_parts():
                    stream.write(part)
        raw = self._file_entry(raw_name, self._num_bytes, self._shard_parts())
        packed = None
        if self._extension:
            with path.open("rb") as file:
                parts = iter(lambda: file.read(1 << 22), b"")
                packed = self._file_entry(name, path.stat().st_size, parts)
        self._shards.append(
            self._settings | {"samples": len(self._ends) - 1, "raw_data": raw, "zip_data": packed}
        )
        self._clear()

    def _file_entry(self, name: str, num_bytes: int, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        return {"basename": name, "bytes": num_bytes, "hashes": hash_parts(self._settings["hashes"], parts)}

    def attach(self, name: str, content: bytes) -> None:
        """A further file that appears together with the data set."""
        with disk_full_is_users(self.path):
            (self._temporary / name).write_bytes(content)

    def attach_json(self, name: str, value: Mapping[str, Any]) -> None:
        """One of JSON."""
        self.attach(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def finish(self) -> None:
        """Write what is left and the index, then move the directory to its name."""
        if self._ends[-1]:
            self._flush()
        with disk_full_is_users(self.path):
            (self._temporary / INDEX).write_text(index_text(self._shards, self.tokenizer))
            publish(self._temporary, self.path)

    def discard(self) -> None:
        """Give up: remove everything written so far."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.finish()
        except BaseException:
            self.discard()
            raise


@contextmanager
def disk_full_is_users(path: Path) -> Iterator[None]:
    """Turns "no space left on device" and its like into a UserError that names the data set."""
    try:
        yield
    except Exception as error:
        if not (why := no_room(error)):
            raise
        raise UserError(
            f"{path}: {why}; what was unfinished has been removed. Free space "
            "(or choose another place) and run the same command again"
        ) from None


def _buffer(num_bytes: int) -> memoryview:
    """Room for a shard's samples, used again for every shard: fresh memory costs more than copying into it."""
    return np.empty(num_bytes, np.uint8).data


def refuse_existing(path: Path) -> None:
    """Raise UserError if `path` is anything but absent or an empty directory; `.` has no name to appear under, and
    a directory cannot be renamed to a link's name."""
    refuse_url(path)
    if path.is_symlink():
        raise UserError(f"{path} is a link; name the place that it leads to, or another one")
    if path.exists() and not (path.name and path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; remove it or choose another name")

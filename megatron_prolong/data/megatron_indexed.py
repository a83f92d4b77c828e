"""Megatron's indexed data sets (PREFIX.bin, PREFIX.idx), read and written, to and from MDS.

The .bin file is tokens and nothing else. The .idx file, little-endian, is

    b"MMIDIDX\\0\\0" | uint64 version 1 | uint8 dtype code | uint64 sequences | uint64 documents + 1
    int32 tokens of each sequence | int64 byte offset of each sequence | int64 first sequence of each document

A Megatron document is a run of sequences, which is just what a packed sequence is: so a pack becomes one
Megatron document and the documents in it its sequences, and both directions keep every boundary. A
tokenized, unpacked sample becomes a document of one sequence. The mask column has no place in the format
and is refused; the domain is given by the user on the way back.
(Format: megatron/core/datasets/indexed_dataset.py, the oracle of the tests.)
"""

from __future__ import annotations

import fcntl
import glob
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.job import lock_file
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.mds.writer import disk_full_is_users
from megatron_prolong.data.packed import Identity, PackedSequence, open_tokens
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.publish import (
    TEMPORARY,
    publish,
    refuse_url,
    remove_leftovers,
    temporary_name,
)

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_CODE = 4


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear only when the block ends without an exception, the index last.

    Raises UserError when there is an index already. A .bin without one is what a kill between the two left; it is
    replaced. What a kill before that left in the making is removed: the lock on it went with its process.
    """

    def __init__(self, prefix: Path) -> None:
        refuse_url(prefix)
        self._paths = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        if self._paths[1].exists():
            raise UserError(f"{self._paths[1]} exists already; remove it or choose another prefix")
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path in self._paths:
            _remove_abandoned(path)
        self._files = [_open_locked(temporary_name(path)) for path in self._paths]
        self._lengths = array("i")
        self._sequences_of_documents = array("i")

    def write(self, tokens: NDArray[np.uint32], sequence_lengths: NDArray[np.int64]) -> None:
        """One document of tokens [S], uint32 below 2**31, made of sequences of the given lengths."""
        assert sequence_lengths.sum() == len(tokens)
        self._files[0].write(tokens.astype("<i4").tobytes())
        self._lengths.frombytes(sequence_lengths.astype("<i4").tobytes())
        self._sequences_of_documents.append(len(sequence_lengths))

    def _write_index(self) -> None:
        lengths = np.array(self._lengths, "<i4")
        offsets = np.cumsum(lengths, dtype="<i8") * 4 - lengths.astype("<i8") * 4
        documents = np.concatenate([[0], np.cumsum(self._sequences_of_documents)]).astype("<i8")
        self._files[1].write(_MAGIC + _HEADER.pack(1, _INT32_CODE, len(lengths), len(documents)))
        for column in (lengths, offsets, documents):
            self._files[1].write(column.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_index()
                for file, path in zip(self._files, self._paths, strict=True):
                    file.flush()
                    publish(Path(file.name), path)
        finally:
            for file in self._files:
                Path(file.name).unlink(missing_ok=True)
            for file in self._files:  # last, as it may raise on a full disk
                file.close()


def _open_locked(path: Path) -> IO[bytes]:
    file = path.open("wb")
    lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _remove_abandoned(final: Path) -> None:
    for path in final.parent.glob(f"{glob.escape(final.name)}{TEMPORARY}*"):
        with path.open("ab") as file:
            if lock_file(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                path.unlink(missing_ok=True)


class IndexedReader:
    """The documents of PREFIX.bin and PREFIX.idx, memory-mapped.

    Raises UserError for missing, damaged or mismatched files and for anything but text tokens.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        index_path, tokens_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (index_path, tokens_path):
            if not path.is_file():
                raise UserError(f"{path}: no such file; give the prefix without .bin and .idx")
        self._read_index(index_path)
        ends = self._offsets + self._lengths * self._dtype.itemsize
        needed, found = int(ends.max(initial=0)), tokens_path.stat().st_size
        if found < needed:
            raise UserError(f"{tokens_path} has {found} bytes, its index names {needed}; copy it again")
        self._tokens = np.memmap(tokens_path, self._dtype, "r") if found else np.zeros(0, self._dtype)

    def _read_index(self, path: Path) -> None:
        data = path.read_bytes()
        start = len(_MAGIC) + _HEADER.size
        if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
            raise UserError(f"{path}: not the index of a Megatron data set (wrong first bytes)")
        version, code, num_sequences, num_edges = _HEADER.unpack_from(data, len(_MAGIC))
        if version != 1 or code not in _DTYPES:
            raise UserError(
                f"{path}: version {version} with element code {code}; only integer tokens are read"
            )
        expected = start + 12 * num_sequences + 8 * num_edges
        if len(data) == expected + num_sequences > expected:
            raise UserError(f"{path}: a multimodal data set; only text is read")
        if len(data) != expected:
            raise UserError(f"{path} has {len(data)} bytes, its header says {expected}; copy it again")
        self._dtype = np.dtype(_DTYPES[code])
        self._lengths = np.frombuffer(data, "<i4", num_sequences, start).astype(np.int64)
        self._offsets = np.frombuffer(data, "<i8", num_sequences, start + 4 * num_sequences)
        self._documents = np.frombuffer(data, "<i8", num_edges, start + 12 * num_sequences)
        edges = self._documents
        if (
            not len(edges)
            or edges[0] != 0
            or edges[-1] != num_sequences
            or (np.diff(edges) < 0).any()
            or (self._lengths < 0).any()
            or (self._offsets < 0).any()
            or (self._offsets % self._dtype.itemsize).any()
        ):
            raise UserError(
                f"{path}: its documents do not cover its {num_sequences} sequences; write it again"
            )

    def __len__(self) -> int:
        return len(self._documents) - 1

    @property
    def is_packed(self) -> bool:
        """Whether some document is made of several sequences."""
        return bool((np.diff(self._documents) > 1).any())

    def __getitem__(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """(tokens uint32 [S], tokens of each of its sequences int64 [D]) of one document."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        span = slice(self._documents[number], self._documents[number + 1])
        lengths = self._lengths[span]
        starts = self._offsets[span] // self._dtype.itemsize
        parts = [self._tokens[start : start + n] for start, n in zip(starts, lengths, strict=True)]
        tokens = np.concatenate([np.zeros(0, self._dtype), *parts])
        for token in (int(tokens.min(initial=0)), int(tokens.max(initial=0))):
            if not 0 <= token < 2**32:
                raise UserError(f"{self.prefix}.bin, document {number}: token {token} is no token id")
        return tokens.astype(np.uint32), lengths

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
        return (self[number] for number in range(len(self)))


def to_megatron(directory: Path, prefix: Path) -> int:
    """Write the samples of an MDS directory as PREFIX.bin and PREFIX.idx; returns how many.

    Raises UserError for data without tokens, with a mask column, or with tokens beyond 31 bits, and for a prefix
    that ends like one of the files or has no name.
    """
    prefix = Path(prefix)
    if prefix.name in ("", ".."):
        raise UserError(
            f"{prefix}: is a directory, not the beginning of the names of two files; give {prefix}/NAME"
        )
    if prefix.suffix in (".bin", ".idx"):
        raise UserError(
            f"{prefix}: is the name of one of two files; give the prefix, {prefix.with_suffix('')}"
        )
    reader = open_tokens(directory, "mask")
    if "mask" in reader.columns:
        raise UserError(
            f"{directory} has a mask column, which Megatron's format cannot hold; "
            "without it, training would not know the assistant's tokens"
        )
    with disk_full_is_users(prefix), IndexedWriter(prefix) as writer:
        for number in track(range(len(reader)), len(reader), f"{prefix}: samples"):
            identity = Identity.of(reader, number)
            sequence = PackedSequence.from_sample(reader[number], identity)
            if sequence.tokens.max() >= 2**31:
                raise UserError(f"{identity}: token {sequence.tokens.max()} does not fit the int32 of .bin")
            writer.write(sequence.tokens, sequence.document_lengths)
    return len(reader)


def from_megatron(prefix: Path, directory: Path, domain: str) -> tuple[int, int]:
    """Write the documents of PREFIX.bin and PREFIX.idx as an MDS directory.

    Returns the number of samples and that of the empty documents left out.
    The `indices` column is written when documents are made of several sequences. MDS has no empty arrays.
    What an earlier attempt left that could not clean up (kill -9) is removed first.
    """
    reader = IndexedReader(prefix)
    columns = {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}
    if reader.is_packed:
        columns["indices"] = "ndarray:uint32"
    remove_leftovers(directory.parent, glob.escape(directory.name))
    with MDSWriter(directory, columns) as writer:
        for tokens, lengths in track(reader, len(reader), f"{directory}: documents"):
            if len(tokens):
                sample = {"input_ids": tokens, "length": len(tokens), "domain": domain}
                if reader.is_packed:
                    ends = np.cumsum(lengths)
                    sample["indices"] = np.stack([ends - lengths, ends], axis=1)[lengths > 0].astype(
                        np.uint32
                    )
                writer.write(sample)
    return writer.num_samples, len(reader) - writer.num_samples

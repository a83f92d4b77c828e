"""The documents of tokenized MDS data sets: where each lies and how long it is, without its tokens.

A sample without the column `indices` is one document. In packed data every span of `indices` is a document
of its own, so that packing again keeps the boundaries. The table costs 26 bytes per document and is kept on
disk, memory-mapped.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.mds import INDEX, MDSReader, common_tokenizer, read_index
from megatron_prolong.data.packed import Identity, check_tokens, open_tokens, read_boundaries, read_mask
from megatron_prolong.data.sources.files import refuse_repeated
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.progress import track

DOCUMENT = np.dtype(
    [("sample", "<i8"), ("start", "<i8"), ("length", "<i8"), ("bos", "?"), ("eos", "?")], align=False
)
"""One document: its sample (counted over all inputs), its first token in the sample, its tokens, and whether
a beginning and an end of text must be added to it."""

_BLOCK_DOCUMENTS = 1 << 16


def identities(inputs: Sequence[str]) -> list[str]:
    """Of tokenized data sets, for the settings of a job: another content, order or number is another job.

    Raises UserError when a shard is in two of them.
    """
    refuse_repeated(str(shard.path) for name in inputs for shard in read_index(Path(name)).shards)
    return [f"{name}, index {digest(Path(name) / INDEX)}" for name in inputs]


def digest(path: Path) -> str:
    """Of a file's content, likewise."""
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


class TokenizedInputs:
    """Several tokenized data sets as one sequence of samples.

    Raises UserError when one has no column input_ids of uint32, when only some have a mask, and when they were made
    with different tokenizers.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._readers = [_open(directory) for directory in directories]
        self._starts = np.cumsum([0, *map(len, self._readers)]).tolist()
        masked = ["mask" in each.columns for each in self._readers]
        self.has_mask = any(masked)
        if self.has_mask and not all(masked):
            masked_one = directories[masked.index(True)]
            raise UserError(f"{masked_one} has a column mask, other inputs have none; keep them apart")
        self.tokenizer = common_tokenizer({str(each.path): each.tokenizer for each in self._readers})
        self.is_packed = any("indices" in each.columns for each in self._readers)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, sample: int) -> dict[str, Any]:
        """Columns input_ids, and where they exist indices, mask (as read_mask) and domain; the other arrays are
        views of the file."""
        reader, number = self._find(sample)
        values = reader[number]
        identity = Identity.of(reader, number)
        check_tokens(values["input_ids"], identity)
        if self.has_mask:
            values["mask"] = read_mask(values["mask"], len(values["input_ids"]), identity)
        if "domain" in values:  # other writers number them
            values["domain"] = str(values["domain"])
        return values

    def name(self, sample: int) -> str:
        """Data set, shard and sample number, for messages."""
        return str(Identity.of(*self._find(sample)))

    def _find(self, sample: int) -> tuple[MDSReader, int]:
        which = bisect_right(self._starts, sample) - 1
        return self._readers[which], sample - self._starts[which]

    def scan(self, bos: int | None, eos: int | None) -> Iterator[NDArray[np.void]]:
        """Tables of the documents of consecutive samples, DOCUMENT [n].

        bos, eos: ids to be added where a document does not begin or end with them already.
        """
        if bos is None and eos is None and all(map(_is_plain, self._readers)):
            yield from self._scan_lengths()
            return
        rows: list[tuple[int, int, int, bool, bool]] = []
        for sample in track(range(len(self)), len(self), "reading lengths"):
            values = self.read(sample)
            tokens = values["input_ids"]
            for start, end in pairwise(self._boundaries(sample, values)):
                add_bos = bos is not None and tokens[start] != bos
                add_eos = eos is not None and tokens[end - 1] != eos
                rows.append((sample, start, end - start, add_bos, add_eos))
            if len(rows) >= _BLOCK_DOCUMENTS:
                yield np.array(rows, DOCUMENT)
                rows = []
        yield np.array(rows, DOCUMENT)

    def _scan_lengths(self) -> Iterator[NDArray[np.void]]:
        """The table of samples that are one document each, where nothing but the length counts."""
        shards = [(reader, number) for reader in self._readers for number in range(len(reader.shards))]
        first = 0
        for reader, number in track(shards, len(shards), "reading lengths of shards"):
            lengths = reader.array_lengths("input_ids", number)
            table = np.zeros(len(lengths), DOCUMENT)
            table["sample"] = np.arange(first, first + len(lengths))
            table["length"] = lengths
            first += len(lengths)
            yield table

    def _boundaries(self, sample: int, values: dict[str, Any]) -> list[int]:
        num_tokens, identity = len(values["input_ids"]), Identity.of(*self._find(sample))
        return read_boundaries(values.get("indices"), num_tokens, identity).tolist()


def _open(directory: str) -> MDSReader:
    reader = open_tokens(directory, "mask", "domain")
    if not reader.shards:
        raise UserError(f"{directory}: no samples; leave it out")
    kind = reader.columns["input_ids"]
    if kind != "ndarray" and kind.split(":")[:2] != ["ndarray", "uint32"]:
        raise UserError(
            f"{directory}: its input_ids are {kind}, not arrays of uint32; "
            "expected tokenized data, as `prolong data tokenize` writes"
        )
    return reader


def _is_plain(reader: MDSReader) -> bool:
    """Every sample is one document, of which only the length has to be known."""
    return reader.columns["input_ids"] == "ndarray:uint32" and not {"mask", "indices"} & reader.columns.keys()


def write_table(path: Path, blocks: Iterator[NDArray[np.void]]) -> None:
    """Write the blocks one after the other; read_table maps the file."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block.tobytes())  # not tofile, whose error would not say that the disk is full


def read_table(path: Path, dtype: np.dtype) -> NDArray[Any]:
    """The whole table, memory-mapped read-only."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")

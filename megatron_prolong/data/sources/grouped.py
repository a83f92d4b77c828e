"""Rows that `prolong data group` has put in order: one document per group, such as all files of a repository.

The rows lie in runs, each sorted by BUCKETS ranges of a hash of the group's name, with a table of where each range
begins. A part is some ranges of all runs: whoever reads it sees every row of its groups, and looks at names and
paths first, so that memory holds the texts of one group only.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSReader
from megatron_prolong.data.sources.base import Bad, Part, Record
from megatron_prolong.data.sources.repositories import JoinedFiles, walk_order
from megatron_prolong.errors import UserError

COLUMNS = {"group": "str", "path": "str", "text": "str"}
"""Of a row. path: empty where rows are no files; they are then taken in the order they came."""
RUNS = "runs.npy"
"""Beside the rows of every task: int64 [runs, BUCKETS + 1], the row at which each range begins, and the end."""
BUCKETS = 4096
_PART_BYTES = 1 << 26
_READ_BYTES = 1 << 16
"""A part takes about so much from every run at least, so that thousands of runs are not read in crumbs."""


def bucket_of(group: str) -> int:
    """Its range of hashes."""
    return xxhash.xxh64_intdigest(group.encode()) * BUCKETS >> 64


class _Row(NamedTuple):
    """What decides where a text goes. number: of the row in the data set, in the order the rows came in."""

    group: str
    place: list[tuple[bool, str]]
    number: int
    path: str


class Grouped:
    kind = "grouped"
    about = "what `prolong data group` wrote: one document per group, such as a repository's files"

    def parts(self, path: str) -> list[Part]:
        reader = MDSReader(path)
        tables = list(_tables(reader))
        num_bytes = sum(shard.raw.num_bytes for shard in reader.shards)
        if not tables or not len(reader):
            raise UserError(f"{path}: no rows in groups; write it with `prolong data group`")
        if sum(map(_num_rows, tables)) != len(reader):
            raise UserError(f"{path}: some of its files {RUNS} are missing; copy or write it again")
        rows = sum((np.diff(table).sum(axis=0) for table in tables), np.zeros(BUCKETS, np.int64))
        least = max(_PART_BYTES, sum(map(len, tables)) * _READ_BYTES)
        parts: list[Part] = []
        start = filled = 0
        for stop, count in enumerate(rows.tolist(), 1):
            filled += num_bytes * count // len(reader)
            if filled and (filled >= least or stop == BUCKETS):
                parts.append(Part(path, start, stop, filled))
                start, filled = stop, 0
        return parts

    def read(self, part: Part) -> Iterator[Record | Bad]:
        names, texts = MDSReader(part.path, columns=["group", "path"]), MDSReader(part.path, columns=["text"])
        rows: list[_Row] = []
        first = 0
        for table in _tables(names):
            for begin, end in table[:, [part.start, part.stop]].tolist():
                for number in range(first + begin, first + end):
                    row = names[number]
                    rows.append(_Row(row["group"], walk_order(row["path"]), number, row["path"]))
            first += _num_rows(table)
        for group, members in groupby(sorted(rows), key=lambda row: row.group):
            document = JoinedFiles()
            for row in members:
                document.add(texts[row.number]["text"], f"### {row.path}\n" if row.path else "")
            yield document.record(f"{part.path}, {group}")


def is_grouped(path: str) -> bool:
    """Whether a data set has such a table, or was merged from some that do."""
    return next(_tables(MDSReader(path)), None) is not None


def _tables(reader: MDSReader) -> Iterator[NDArray[np.int64]]:
    """The tables of all tasks, in the order of the rows; mapped, as most of them is for other parts."""
    directories = ((shard.directory / shard.raw.basename).parent for shard in reader.shards)
    files = [directory / RUNS for directory in dict.fromkeys(directories)]
    return (_table(file) for file in files if file.exists())


def _table(file: Path) -> NDArray[np.int64]:
    try:
        table: NDArray[np.int64] = np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{file}: damaged ({error}); copy or write it again") from None
    return table


def _num_rows(table: NDArray[np.int64]) -> int:
    """Of a task."""
    return int(table[-1, -1]) if len(table) else 0

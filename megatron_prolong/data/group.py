"""Rows of files to whole repositories: what belongs together is put together, wherever it lies in the sources.

Published code (The Stack, StarCoder's) has one row per file. ProLong concatenates the files of a repository, and
textbooks of one subject. Rows are sorted here by a hash of the group's name, each run of some 256 MiB by itself,
and written with a table of where each range of hashes begins; `data/sources/grouped.py` reads a range of all runs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.executors import Executor
from megatron_prolong.data.job import REPORT, Job
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.records import (
    Parts,
    SourcesReport,
    describe,
    field_of,
    in_lots,
    into_tasks,
    leave_out,
    list_parts,
    missing,
    spelled_alike,
    text_problem,
)
from megatron_prolong.data.sources import Bad, Record, source_of
from megatron_prolong.data.sources.grouped import BUCKETS, COLUMNS, RUNS, bucket_of
from megatron_prolong.data.sources.repositories import unwanted

RUN_BYTES = 1 << 28


@dataclass(frozen=True)
class GroupOptions:
    """by: field with the name, or the number, of a row's group. path_field: field with the path of the file that a
    row is; then a group is a source tree, as of kind `repositories`: its order, its lines `### path`, and what is
    left out. Without it texts follow in the order they come. kind, text_field, on_bad_input: as of tokenize.
    """

    by: str
    path_field: str | None = None
    kind: str | None = None
    text_field: str = "text"
    on_bad_input: Literal["stop", "skip"] = "stop"


def group(
    sources: Sequence[str],
    out: Path | str,
    options: GroupOptions,
    *,
    executor: Executor | None = None,
    slurm: Mapping[str, str] | None = None,
) -> SourcesReport | None:
    """Put the rows of `sources` in order into `out`, for tokenize to make one document of each group.

    The report counts rows as documents. slurm: as of tokenize.
    Raises UserError for bad input, naming file and record.
    """
    sources = spelled_alike(sources)
    parts = list_parts(sources, options.kind, Path(out))
    job = Job(Path(out), {"step": "group", **describe(sources, parts, options)})
    return SourcesReport.complete(job, into_tasks(parts, RUN_BYTES), _Work(options), executor, slurm)


Row = dict[str, str]
"""With the COLUMNS of sources/grouped.py."""


@dataclass(frozen=True)
class _Work:
    """One task: read its parts, sort them run by run, write one directory. Picklable, for any process to do."""

    options: GroupOptions

    def __call__(self, directory: Path, parts: Parts) -> None:
        report, table = SourcesReport(), io.BytesIO()
        runs = in_lots(self._rows(parts, report), RUN_BYTES, lambda row: len(row["text"]))
        with MDSWriter(directory, COLUMNS) as writer:
            tables = [_write_sorted(writer, run) for run in runs]
            np.save(table, np.array(tables, np.int64).reshape(-1, BUCKETS + 1))
            writer.attach(RUNS, table.getvalue())
            writer.attach_json(REPORT, vars(report))

    def _rows(self, parts: Parts, report: SourcesReport) -> Iterator[Row]:
        """The usable rows; the others are counted, or stop the job."""
        for kind, part in parts:
            for found in source_of(kind).read(part):
                row = found if isinstance(found, Bad) else self._row(found)
                if isinstance(row, Bad):
                    leave_out(row, self.options.on_bad_input, report.left_out)
                elif self.options.path_field and (reason := unwanted(row["path"], row["text"].encode())):
                    report.left_out[f"file: {reason}"] += 1
                else:
                    report.documents += 1
                    yield row

    def _row(self, record: Record) -> Row | Bad:
        fields = [("group", self.options.by, "--by"), ("text", self.options.text_field, "--text-field")]
        if self.options.path_field:
            fields.append(("path", self.options.path_field, "--path-field"))
        row = {"path": ""}
        for column, name, option in fields:
            value = field_of(record.fields, name)
            if value == "" and column != "text":
                return missing(record, name, option)
            if column == "group" and isinstance(value, int | np.integer):
                value = str(value)
            elif problem := text_problem(record, name, option):
                return problem
            row[column] = value
        row["text"] = row["text"].removeprefix("\ufeff")
        return row


def _write_sorted(writer: MDSWriter, run: list[Row]) -> NDArray[np.int64]:
    """Write a run by ranges of hashes, each in the order the rows came in; returns where each range begins."""
    first = writer.num_samples
    buckets = np.array([bucket_of(row["group"]) for row in run])
    for number in np.argsort(buckets, kind="stable"):
        writer.write(run[number])
    return first + np.searchsorted(np.sort(buckets), np.arange(BUCKETS + 1))

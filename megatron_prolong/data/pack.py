"""Tokenized documents to packed sequences of one length, in three steps.

1. Scan: the table of documents (data/documents.py), optionally shuffled.
2. Plan: which piece of which document goes into which pack (data/packing.py); kept on disk.
3. Execute: ranges of packs are written by any number of workers (data/job.py).

The plan is made of lengths alone, hence the packs are the same for every number of workers, and no worker
loses a partial pack. Every token is accounted for: in + added + repeated = packed + dropped, by reason.

Columns, as in ProLong's published packs: input_ids uint32 [S], indices uint32 [documents, 2] (start and end
of each document in the pack), domain, length; and mask uint8 [S] when the input has it. A pack of several
domains names them all, joined by `+`.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.documents import DOCUMENT, TokenizedInputs, identities, read_table, write_table
from megatron_prolong.data.executors import Executor, LocalProcesses
from megatron_prolong.data.job import REPORT, Job, write_json
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.mds.writer import disk_full_is_users
from megatron_prolong.data.packing import Losses, Pack, Rules, best_fit, concatenate, cut_by_lengths
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import publish, remove, temporary_name

Mode = Literal["single", "concat", "bestfit"]
TASK_TOKENS = 1 << 26
_BLOCK = 1 << 16

PIECE = np.dtype(
    [("sample", "<i8"), ("start", "<i8"), ("stop", "<i8"), ("bos", "?"), ("eos", "?")], align=False
)
"""Tokens [start, stop) of a sample, after an added beginning of text, before an added end of text."""


@dataclass(frozen=True)
class PackOptions:
    """mode: `single` cuts documents into chunks of `lengths` (default: the pack's length) and drops what is
    shorter; `concat` fills packs and lets the cut document go on in the next; `bestfit` cuts no document that
    fits, packs may be shorter. min_length, overlap, intact: see Rules. bos, eos: token ids to put around
    every document that lacks them; none by default, as in ProLong. shuffle_seed: take the documents in
    random order. domain: name to write instead of the input's.
    """

    length: int
    mode: Mode
    min_length: int = 1
    lengths: tuple[int, ...] = ()
    overlap: int = 0
    intact: bool = False
    bos: int | None = None
    eos: int | None = None
    shuffle_seed: int | None = None
    domain: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.length < 1:
            problems.append(f"length {self.length} must be at least 1")
        if self.mode not in ("single", "concat", "bestfit"):
            problems.append(f"mode {self.mode!r} is none of single, concat, bestfit")
        if self.lengths and self.mode != "single":
            problems.append("lengths belong to mode single")
        problems += [
            f"chunk length {each} does not divide the pack's length {self.length}"
            for each in self.lengths
            if each < 1 or self.length % each
        ]
        if not 0 <= self.overlap < min(self.length, *self.chunk_lengths):
            problems.append(f"overlap {self.overlap} must be less than the length of a chunk or pack")
        if self.overlap and self.intact:
            problems.append(
                f"overlap {self.overlap} has no effect with intact: a cut document has no next piece"
            )
        if self.min_length > self.length and self.mode != "single":
            problems.append(f"min_length {self.min_length} is longer than a pack, {self.length}")
        if problems:
            raise UserError.many("these packing options do not fit together:", problems)

    @property
    def chunk_lengths(self) -> tuple[int, ...]:
        return self.lengths or (self.length,)


@dataclass
class PackReport:
    """The account: tokens + added + repeated == packed + sum(dropped.values()).

    tokens, documents: in the input. added: beginnings and ends of text. repeated: by overlap. packs: by
    subset (`chunk-pack` lengths; "" if there is one only). capacity: packs times length; packed / capacity
    is how full they are.
    """

    documents: int = 0
    tokens: int = 0
    added: int = 0
    repeated: int = 0
    packed: int = 0
    capacity: int = 0
    packs: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def balances(self) -> bool:
        return self.tokens + self.added + self.repeated == self.packed + sum(self.dropped.values())


def pack(
    inputs: Sequence[Path | str],
    out: Path | str,
    options: PackOptions,
    *,
    executor: Executor | None = None,
    slurm: Mapping[str, str] | None = None,
) -> PackReport | None:
    """Pack tokenized data sets into `out`; a stopped run is continued. With `lengths`, `out` holds one data
    set per chunk length, `OUT/65536-524288` for chunks of 64K in packs of 512K.

    slurm: the environment of an array job, to do its share only; then None is returned while other jobs
    still have tasks to do. Raises UserError for bad input, naming data set and sample.
    """
    names = [str(Path(each)) for each in inputs]
    job = Job(Path(out), _settings(names, options))
    if not job.is_finished:
        with job.open():
            plan = _plan(job, names, options)
            tasks = plan.tasks()
            if not job.run(tasks, _Work(names, options, plan), executor or LocalProcesses(1), slurm):
                return None
            job.finish(tasks, lambda: asdict(plan.report))
    return PackReport(**job.report())


def _settings(inputs: Sequence[str], options: PackOptions) -> dict[str, Any]:
    TokenizedInputs(inputs)  # a missing or unsuitable input is better reported by it
    return {
        "step": "pack",
        "inputs": identities(inputs),
        **asdict(options),
        "lengths": list(options.lengths),
    }


_Range = tuple[str, int, int]
"""(subset, first pack, last pack + 1)"""


@dataclass(frozen=True)
class _Plan:
    """Where the plan lies, and its account. Two tables per subset: pieces, and where each pack ends in them."""

    directory: Path
    length: int
    report: PackReport

    def tasks(self) -> dict[str, _Range]:
        """Task directory to the packs that it gets, TASK_TOKENS of them or one."""
        step = max(1, TASK_TOKENS // self.length)
        return {
            str(Path(subset) / f"{first // step:05}"): (subset, first, min(first + step, count))
            for subset, count in self.report.packs.items()
            for first in range(0, count, step)
        }

    def packs_of(
        self, subset: str, first: int, last: int
    ) -> Iterator[list[tuple[int, int, int, bool, bool]]]:
        """The packs of one task as lists of PIECE values."""
        pieces = read_table(self.directory / f"pieces{subset}", PIECE)
        ends = read_table(self.directory / f"ends{subset}", np.dtype("<i8"))
        start = int(ends[first - 1]) if first else 0
        for end in ends[first:last].tolist():
            yield pieces[start:end].tolist()
            start = end


def _plan(job: Job, inputs: Sequence[str], options: PackOptions) -> _Plan:
    """Make the plan, or take the one that an earlier or concurrent run of this job made."""
    directory = job.directory / "plan"
    with job.alone():
        if not directory.exists():
            _write_plan(job, directory, inputs, options)
        report = PackReport(**json.loads((directory / REPORT).read_bytes()))
        if not sum(report.packs.values()):
            remove(job.directory)
            reasons = [f"{reason}: {count:,} tokens" for reason, count in report.dropped.items() if count]
            raise UserError.many(
                f"{job.out}: not a single pack of {options.length} tokens comes of "
                f"{report.documents:,} documents with {report.tokens:,} tokens; dropped:",
                reasons,
            )
    return _Plan(directory, options.length, report)


def _write_plan(job: Job, directory: Path, inputs: Sequence[str], options: PackOptions) -> None:
    temporary = temporary_name(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with disk_full_is_users(job.out):
            report = _make_plan(temporary, TokenizedInputs(inputs), options)
            write_json(temporary / REPORT, asdict(report))
            publish(temporary, directory)
    except OSError:  # where there are no locks, another job of the array may be first, with the same plan
        if not directory.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_plan(directory: Path, inputs: TokenizedInputs, options: PackOptions) -> PackReport:
    write_table(directory / "documents", inputs.scan(options.bos, options.eos))
    table = read_table(directory / "documents", DOCUMENT)
    report = PackReport(
        documents=len(table),
        tokens=int(table["length"].sum()),
        added=int(table["bos"].sum()) + int(table["eos"].sum()),
    )
    writers: dict[str, _PlanWriter] = {}
    losses = Losses()
    for subset, pieces in _packs(_lengths(table, options.shuffle_seed), options, losses):
        if subset not in writers:
            writers[subset] = _PlanWriter(directory, subset, table)
        writers[subset].add(pieces)
    for subset, writer in writers.items():
        writer.close()
        report.packs[subset] = writer.num_packs
        report.packed += writer.num_tokens
        report.capacity += writer.num_packs * options.length
    report.repeated = losses.repeated
    report.dropped = {reason: count for reason, count in losses.dropped.items() if count}
    assert report.balances, f"tokens were lost: {report}"
    return report


def _lengths(table: NDArray[Any], seed: int | None) -> Iterator[tuple[int, int]]:
    """(document, its length with what will be added), in the order to pack them."""
    order = None if seed is None else np.random.RandomState(seed).permutation(len(table))
    for start in range(0, len(table), _BLOCK):
        stop = min(start + _BLOCK, len(table))
        numbers = np.arange(start, stop) if order is None else order[start:stop]
        rows = table[numbers]
        yield from zip(numbers.tolist(), (rows["length"] + rows["bos"] + rows["eos"]).tolist(), strict=True)


def _packs(
    documents: Iterator[tuple[int, int]], options: PackOptions, losses: Losses
) -> Iterator[tuple[str, Pack]]:
    """(subset, pack) for every pack, subsets in turn as they fill."""
    rules = Rules(options.length, options.min_length, options.overlap, options.intact)
    if options.mode != "single":
        make = concatenate if options.mode == "concat" else best_fit
        for each in make(documents, rules, losses):
            yield "", each
        return
    open_packs: defaultdict[int, Pack] = defaultdict(list)
    for chunk, piece in cut_by_lengths(documents, options.chunk_lengths, rules, losses):
        open_packs[chunk].append(piece)
        if len(open_packs[chunk]) * chunk == options.length:
            yield f"{chunk}-{options.length}" if options.lengths else "", open_packs.pop(chunk)
    losses.dropped["last pack not full"] += sum(chunk * len(left) for chunk, left in open_packs.items())


class _PlanWriter:
    """Turns pieces of documents into pieces of samples, a block at a time, and appends them to two files."""

    def __init__(self, directory: Path, subset: str, documents: NDArray[Any]) -> None:
        self.num_packs = 0
        self.num_tokens = 0
        self._documents = documents
        self._pieces: Pack = []
        self._ends: list[int] = []
        self._num_pieces = 0
        self._files = [(directory / f"{name}{subset}").open("wb") for name in ("pieces", "ends")]

    def add(self, pieces: Pack) -> None:
        self._pieces += pieces
        self._num_pieces += len(pieces)
        self._ends.append(self._num_pieces)
        self.num_packs += 1
        if len(self._pieces) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        numbers, starts, stops = np.array(self._pieces, np.int64).reshape(-1, 3).T
        rows = self._documents[numbers]
        lengths, bos = rows["length"], rows["bos"].astype(np.int64)
        table = np.empty(len(numbers), PIECE)
        table["sample"] = rows["sample"]
        table["start"] = rows["start"] + np.maximum(starts - bos, 0)
        table["stop"] = rows["start"] + np.minimum(stops - bos, lengths)
        table["bos"] = rows["bos"] & (starts == 0)
        table["eos"] = rows["eos"] & (stops == bos + lengths + 1)
        self.num_tokens += int((stops - starts).sum())
        self._files[0].write(table.tobytes())
        self._files[1].write(np.array(self._ends, "<i8").tobytes())
        self._pieces, self._ends = [], []

    def close(self) -> None:
        self._flush()
        for file in self._files:
            file.close()


@dataclass(frozen=True)
class _Work:
    """One task: copy the pieces of its packs together. Picklable, for any process to do."""

    inputs: list[str]
    options: PackOptions
    plan: _Plan

    def __call__(self, directory: Path, task: _Range) -> None:
        inputs = TokenizedInputs(self.inputs)
        columns = {
            "input_ids": "ndarray:uint32",
            "indices": "ndarray:uint32",
            "length": "int",
            "domain": "str",
        }
        if inputs.has_mask:
            columns["mask"] = "ndarray:uint8"
        with MDSWriter(directory, columns, tokenizer=inputs.tokenizer) as writer:
            for pieces in self.plan.packs_of(*task):
                writer.write(_assemble(pieces, inputs, self.options))


def _assemble(
    pieces: list[tuple[int, int, int, bool, bool]], inputs: TokenizedInputs, options: PackOptions
) -> dict[str, Any]:
    """One pack. Added beginnings and ends of text have mask 0: nobody wrote them in the chat."""
    ends = np.cumsum([stop - start + bos + eos for _, start, stop, bos, eos in pieces])
    tokens = np.empty(ends[-1], np.uint32)
    mask = np.zeros(ends[-1], np.uint8) if inputs.has_mask else None
    domains: set[str] = set()
    last, values = -1, {}
    at = 0
    for sample, start, stop, bos, eos in pieces:
        if sample != last:
            last, values = sample, inputs.read(sample)
        if bos:
            tokens[at] = options.bos
        at += bos
        end = at + stop - start
        tokens[at:end] = values["input_ids"][start:stop]
        if mask is not None:
            mask[at:end] = values["mask"][start:stop]
        if eos:
            tokens[end] = options.eos
        at = end + eos
        domains.add(values.get("domain", ""))
    result = {
        "input_ids": tokens,
        "indices": np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.uint32),
        "length": len(tokens),
        "domain": options.domain if options.domain is not None else "+".join(sorted(domains)),
    }
    return result if mask is None else result | {"mask": mask}

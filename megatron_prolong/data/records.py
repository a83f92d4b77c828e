"""What tokenize and group share: the parts of their sources, dealt out into tasks, and the fields of a record."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from megatron_prolong.data.executors import Executor, LocalProcesses
from megatron_prolong.data.job import Job
from megatron_prolong.data.report import Report
from megatron_prolong.data.sources import Bad, Part, Record, find_kind, source_of
from megatron_prolong.data.sources.files import is_remote, refuse_repeated, warn
from megatron_prolong.errors import UserError

Parts = Sequence[tuple[str, Part]]
"""Parts of sources, each with the source's kind."""
T = TypeVar("T")


@dataclass
class SourcesReport(Report):
    """What became of the records of sources. left_out: reason to count, of those that were not taken."""

    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: Mapping[str, Any]) -> None:
        super().add(other)
        self.left_out.update(other["left_out"])

    @classmethod
    def complete(
        cls,
        job: Job,
        tasks: Mapping[str, Parts],
        work: Callable[[Path, Parts], None],
        executor: Executor | None,
        slurm: Mapping[str, str] | None,
        refuse: Callable[[Self], None] | None = None,
    ) -> Self | None:
        """Do a job's tasks and report; None while others of a Slurm array still have some to do.

        refuse: raises UserError for a sum of the tasks' reports whose result is of no use; nothing of it is kept.
        """
        if job.is_finished:
            # The settings know the files' sizes, not their contents.
            warn(
                f"{job.out}: made before, of files of these names and sizes; nothing was done (remove it to "
                "start anew)"
            )
        else:
            with job.open():
                if not job.run(tasks, work, executor or LocalProcesses(1), slurm):
                    return None
                job.finish(tasks, lambda: vars(cls._sum(job, tasks, refuse)))
        return cls.of([job.report()])

    @classmethod
    def _sum(cls, job: Job, tasks: Iterable[str], refuse: Callable[[Self], None] | None) -> Self:
        total = cls.of(job.task_reports(tasks))
        if refuse:
            refuse(total)
        if not total.documents:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(total.left_out.items()))
            raise UserError(
                f"{job.out}: not a single document in the sources; left out: {reasons or 'nothing'}"
            )
        return total


def list_parts(sources: Sequence[str], kind: str | None, out: Path) -> Parts:
    """The parts of all sources, in order. Raises UserError where there is none, or OUT would be among them."""
    for source in sources:
        _refuse_inside(out, source)
    kinds = [kind or find_kind(source) for source in sources]
    found = [source_of(kind).parts(source) for kind, source in zip(kinds, sources, strict=True)]
    refuse_repeated(path for own in found for path in dict.fromkeys(part.path for part in own))
    return [(kind, part) for kind, own in zip(kinds, found, strict=True) for part in own]


def _refuse_inside(out: Path, source: str) -> None:
    """A job that goes on, and the others of an array, would find its files among the source's."""
    if not is_remote(source) and Path(source).resolve() in out.resolve().parents:
        raise UserError(f"{out}: lies in {source}, and would be read as a part of it; choose a place outside")


def spelled_alike(sources: Sequence[str]) -> list[str]:
    """x/ and ./x are x."""
    return [source if is_remote(source) else str(Path(source)) for source in sources]


def describe(sources: Sequence[str], parts: Parts, options: Any) -> dict[str, Any]:
    """The settings of a job: other names, numbers or sizes of files are another job, as are other options (a
    dataclass with on_bad_input)."""
    settings = asdict(options)
    # A job that stopped may go on with `skip`: its finished tasks met no bad input.
    settings.pop("on_bad_input")
    listing = hashlib.sha256(repr(parts).encode()).hexdigest()
    num_bytes = sum(part.num_bytes for _, part in parts)
    return {
        "sources": list(sources),
        "files": f"{len(parts)} parts, {num_bytes} bytes, sha256 {listing}",
        **settings,
    }


def into_tasks(parts: Parts, task_bytes: int) -> dict[str, Parts]:
    """Consecutive parts of about `task_bytes` together, by the task's name."""
    tasks = in_lots(parts, task_bytes, lambda part: part[1].num_bytes)
    return {f"{number:05}": task for number, task in enumerate(tasks)}


def in_lots(
    items: Iterable[T], lot: int, size: Callable[[T], int], most: int = sys.maxsize
) -> Iterator[list[T]]:
    """Consecutive items whose sizes come to about `lot` together, `most` of them at most."""
    found: list[T] = []
    room = lot
    for item in items:
        found.append(item)
        room -= size(item)
        if room <= 0 or len(found) >= most:
            yield found
            found, room = [], lot
    if found:
        yield found


def field_of(fields: Mapping[str, Any], name: str) -> Any:
    """fields["a.b"], or fields["a"]["b"]; None where there is no such thing."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def missing(record: Record, name: str, option: str) -> Bad:
    """For a record without a field, or with null in it. option: names another field."""
    known = ", ".join(record.fields)
    return Bad(
        record.name,
        f"field {name!r} is missing or null (fields: {known}; {option} names another)",
        f"no field {name}",
    )


def text_problem(record: Record, name: str, option: str) -> Bad | None:
    """What keeps a field from holding a text, which half a surrogate pair is not."""
    value = field_of(record.fields, name)
    if value is None:
        return missing(record, name, option)
    if not isinstance(value, str):
        return Bad(record.name, f"field {name!r} is {type(value).__name__}, not text", "not text")
    return Bad(record.name, "", "empty") if not value else surrogate_problem(record, value)


def surrogate_problem(record: Record, text: str) -> Bad | None:
    """That a text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Bad(record.name, f"has half a surrogate pair at character {error.start}", "not UTF-8")
    return None


def leave_out(bad: Bad, on_bad_input: str, left_out: Counter[str]) -> None:
    """Count what is no document. Raises UserError for bad input, where the job is to stop at it."""
    if bad.problem and on_bad_input == "stop":
        raise UserError(
            f"{bad.name}: {bad.problem}; correct it, or leave such records out with --on-bad-input skip"
        )
    left_out[f"document: {bad.reason}"] += 1

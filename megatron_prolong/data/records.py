"""What tokenize and group share: the parts of their sources, dealt out into tasks, and the fields of a record."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prolong.data.sources import Bad, Part, Record, find_kind, source_of
from megatron_prolong.data.sources.files import is_remote, refuse_repeated, warn
from megatron_prolong.errors import UserError

Parts = Sequence[tuple[str, Part]]
"""Parts of sources, each with the source's kind."""


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


def describe(sources: Sequence[str], parts: Parts) -> dict[str, Any]:
    """For the settings of a job: other names, numbers or sizes of files are another job."""
    listing = hashlib.sha256(repr(parts).encode()).hexdigest()
    num_bytes = sum(part.num_bytes for _, part in parts)
    return {
        "sources": list(sources),
        "files": f"{len(parts)} parts, {num_bytes} bytes, sha256 {listing}",
    }


def warn_made_before(out: Path) -> None:
    """The settings know the files' sizes, not their contents."""
    warn(f"{out}: made before, of files of these names and sizes; nothing was done (remove it to start anew)")


def into_tasks(parts: Parts, task_bytes: int) -> dict[str, Parts]:
    """Consecutive parts of about `task_bytes` together, by the task's name."""
    tasks: list[list[tuple[str, Part]]] = []
    room = 0
    for kind, part in parts:
        if room <= 0:
            tasks.append([])
            room = task_bytes
        tasks[-1].append((kind, part))
        room -= part.num_bytes
    return {f"{number:05}": task for number, task in enumerate(tasks)}


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


def refuse_nothing(out: Path, left_out: Mapping[str, int]) -> None:
    """Raises UserError for a job that has found no document."""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(left_out.items()))
    raise UserError(f"{out}: not a single document in the sources; left out: {reasons or 'nothing'}")

"""What a source is: something that can be cut into parts and gives records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

MAX_RECORD_BYTES = 1 << 28
"""A text longer than 256 MiB is left out (a repository is cut there): some 64M tokens as one document."""


class Part(NamedTuple):
    """A piece of a source, read in one go. start, stop: bytes, rows or samples, as the source counts."""

    path: str
    start: int
    stop: int
    num_bytes: int


class Record(NamedTuple):
    """One document before tokenizing. name: for messages, such as `books.jsonl, line 17`.
    left_out: reason to count, for pieces of this document that were not taken."""

    name: str
    fields: Mapping[str, Any]
    left_out: Mapping[str, int] = {}


class Bad(NamedTuple):
    """What should have been a document and is not. problem: for the message; reason: for the count."""

    name: str
    problem: str
    reason: str


class Source(Protocol):
    """kind: the word for --kind. about: one line for `prolong data sources`."""

    kind: str
    about: str

    def parts(self, path: str) -> list[Part]:
        """The parts of what lies at `path`, in a fixed order. Raises UserError when there is nothing."""
        ...

    def read(self, part: Part) -> Iterator[Record | Bad]:
        """The records of one part, in order."""
        ...

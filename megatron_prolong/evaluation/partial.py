"""Outputs of a task while it runs: one line per finished sample, so that a stopped run goes on where it was.

A line is found again by what determines the output (model, prompt, limits), not by its place, so a changed
option or a retrained model never picks up old outputs.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_prolong.runtime.strict_json import read_lines


@dataclass(frozen=True)
class Generated:
    """One sample's output. Lengths in tokens; removed_tokens of the context by truncation."""

    key: str
    output: str
    input_len: int
    output_len: int
    removed_tokens: int
    input_text: str


class PartialOutputs:
    """The file NAME.partial.jsonl; `add` appends and flushes. A line cut off by a crash is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Generated] = {}
        for entry in read_lines(path):
            with suppress(TypeError):  # the fields of another version
                sample = Generated(**entry)
                self.done[sample.key] = sample
        self._file = open_to_add(path)

    def add(self, sample: Generated) -> None:
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        self._file.flush()
        self.done[sample.key] = sample

    def remove(self) -> None:
        """Once the result file is written."""
        self._file.close()
        self.path.unlink(missing_ok=True)  # the same command, given twice, may have been faster

    def __enter__(self) -> PartialOutputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self.path.exists() and not self.path.stat().st_size:  # failed at the first
            self.path.unlink()


def open_to_add(path: Path) -> IO[str]:
    """Open a file of lines to add more of them; a line cut off by a crash is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


def sample_key(*parts: object) -> str:
    """A short fingerprint of everything that determines an output."""
    return hashlib.sha256("\x00".join(map(str, parts)).encode("utf-8")).hexdigest()[:32]

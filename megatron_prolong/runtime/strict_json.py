"""JSON that every reader accepts, with null for NaN and infinity; and JSON Lines, read even where a process died
while writing a line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_prolong.runtime.publish import write_durably


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values and dataclasses."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a file of `dumps` that a reader never sees half of."""
    write_durably(path, dumps(value, indent=2) + "\n")


def with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of numbers as it was before `dumps`: null is NaN again."""
    return {key: math.nan if value is None else value for key, value in record.items()}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; a line that is cut off or damaged is skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""JSON that every reader takes: it has no NaN and no infinity, so what is not finite is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def with_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of numbers as it was before `dumps`: null is NaN again."""
    return {key: math.nan if value is None else value for key, value in record.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

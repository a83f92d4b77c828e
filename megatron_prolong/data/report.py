"""What tokenize, filter and group count: every task its own part, the job the sum of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass
class Report:
    """Base of the reports: all their whole numbers are summed."""

    documents: int = 0

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Any]]) -> Self:
        """The sum of reports as they are on disk."""
        total = cls()
        for part in parts:
            total.add(part)
        return total

    def add(self, other: Mapping[str, Any]) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int):
                setattr(self, name, value + other[name])

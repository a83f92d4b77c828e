"""Where every value of a recipe was written, so that a message can name its file and line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where a value was written: a file and line (1-based), or an override on the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Origin:
    """Where each value of a recipe was written. Not part of its meaning, so all origins are equal.

    Keys are paths with stages by name: ("stages", "64k", "lr").
    """

    file: str = field(default="recipe", compare=False)
    places: dict[tuple[str, ...], Place] = field(default_factory=dict, compare=False)

    def place(self, key: tuple[str, ...]) -> Place:
        """The place of `key`, else that of the nearest thing around it, else the file."""
        for end in range(len(key), 0, -1):
            if found := self.places.get(key[:end]):
                return found
        return Place(self.file)

"""What is wrong with a recipe, as lines that say where it was written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from megatron_prolong.errors import UserError
from megatron_prolong.recipe.schema import Recipe
from megatron_prolong.recipe.source import Key, key_text


@dataclass
class Findings:
    """Errors stop a run, warnings are worth reading before it starts.

    Attributes:
        doubtful: keys that hold stand-ins for values that were wrong; they are not judged.
    """

    recipe: Recipe
    doubtful: Collection[Key] = ()
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, key: Key, message: str, uses: Collection[Key] = ()) -> None:
        """Note a problem of `key`, unless a value it was derived from, at or in `uses`, is a stand-in."""
        self._note(self.errors, key, message, uses)

    def warn(self, key: Key, message: str) -> None:
        """The same, for something that does not stop the run."""
        self._note(self.warnings, key, message, ())

    def _note(self, notes: list[str], key: Key, message: str, uses: Collection[Key]) -> None:
        if self._is_doubtful(key) or any(map(self.has_doubtful_part, uses)):
            return
        line = f"{self.recipe.origin.place(key)}: {key_text(key)}: {message}"
        if line not in notes:
            notes.append(line)

    def _is_doubtful(self, key: Key) -> bool:
        """True when `key`, or something around it, could not be read."""
        return any(key[:end] in self.doubtful for end in range(1, len(key) + 1))

    def has_doubtful_part(self, key: Key) -> bool:
        """True when `key`, or something around or within it, could not be read."""
        return self._is_doubtful(key) or any(part[: len(key)] == key for part in self.doubtful)


def problems_error(file: str, problems: Collection[str]) -> UserError:
    """The error that lists every problem of a recipe file."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return UserError.many(f"{file}: the recipe has {count}:", problems)

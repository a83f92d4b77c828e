"""The one exception type that is shown to users as a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input from the user: what is wrong, where, and what to do. The CLI exits with code 2.

    Anything else that escapes is a bug of ours and keeps its traceback.
    """

    @classmethod
    def many(cls, title: str, problems: Iterable[str]) -> UserError:
        """One error that reports every problem at once, one per line."""
        return cls("\n".join([title, *(f"  - {problem}" for problem in problems)]))

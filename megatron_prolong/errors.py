"""The exceptions that are shown to users as a message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Bad input from the user: what is wrong, where, and what to do. The CLI exits with `exit_code`.

    Anything else that escapes is a bug of ours and keeps its traceback.
    """

    exit_code = 2

    @classmethod
    def many(cls, title: str, problems: Iterable[str]) -> UserError:
        """One error that reports every problem at once, one per line."""
        return cls("\n".join([title, *(f"  - {problem}" for problem in problems)]))


class PassingError(UserError):
    """A problem that may pass by itself, as a file server's fault: starting again is worth a try. Exit code 1."""

    exit_code = 1


class JointError(UserError):
    """A UserError that every rank of a job raises at the same point, whichever met it; rank 0 reports it.

    Attributes:
        said_here: whether this rank reports it; on the others the CLI exits in silence.
    """

    def __init__(self, message: str, *, said_here: bool, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.said_here, self.exit_code = said_here, exit_code


class RankLost(Exception):  # noqa: N818 - an event seen from a healthy rank, not its error
    """Another rank of the job is gone, or does not arrive at a collective. The CLI exits with code 1."""

"""Faults of file servers and networks that pass by themselves: a fail-over, an evicted client, a lost connection.

A month on hundreds of nodes meets some. What failed is worth another try, in the same process where that can be
done, else by starting again (exit code 1, at which a batch job goes back into the queue).
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_prolong.errors import PassingError, UserError

T = TypeVar("T")

WAITS_SECONDS = (5.0, 30.0, 60.0)  # before each further try: a file server's fail-over takes a minute or two
_PASSING = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.ENOTCONN,
    errno.EREMOTEIO, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT,
})  # fmt: skip


def is_passing(error: BaseException | None) -> bool:
    """Whether such a fault is behind an error, or behind what it was raised from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def exit_code(error: UserError | OSError) -> int:
    """Of the command that it ends."""
    if is_passing(error):
        return PassingError.exit_code
    return error.exit_code if isinstance(error, UserError) else UserError.exit_code


def patiently(action: Callable[[], T], what: str, wait: Callable[[float], object] = time.sleep) -> T:
    """Call `action`, which can be called again, and again after a wait where a fault stopped it that passes.

    Args:
        what: is being done, for the warning.
        wait: for so many seconds.

    Raises:
        Exception: what the last try met, or a try that a lasting fault stopped.
    """
    for seconds in WAITS_SECONDS:
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
            host = socket.gethostname()
            print(f"warning: {host}: {what}: {error}; trying again in {seconds:g} s", file=sys.stderr)
        wait(seconds)
    return action()

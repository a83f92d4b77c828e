"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0
RECENT_STEPS = 20
"""Training steps whose median time tells what is left. Documents differ in length, and so do steps in time; a mean
would carry a checkpoint's pause, and rich's own estimate forgets what is 30 s old: a step here."""


def track(
    items: Iterable[T], total: int, what: str, amount: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Pass the items through while reporting `sum(amount(item))` of `total` on standard error."""
    with progress(what, total) as advance:
        for item in items:
            yield item
            advance(amount(item))


@contextlib.contextmanager
def progress(what: str, total: int, *, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a thread-safe function to call with the amount just done; bytes are shown with their speed."""
    if not sys.stderr.isatty():
        yield _Lines(what, total, in_bytes).advance
        return
    from rich import progress as rich
    from rich.console import Console

    done = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.TaskProgressColumn(),)
    name = rich.TextColumn("{task.description}", markup=False)
    columns = (name, rich.BarColumn(), *done, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda amount: bar.advance(task, amount)


class _Lines:
    """Prints a line every ten seconds; work that takes less prints none."""

    def __init__(self, what: str, total: int, in_bytes: bool) -> None:
        self._what, self._total, self._in_bytes = what, total, in_bytes
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._printed > _SECONDS_BETWEEN_LINES:
                self._printed = now
                print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        done, total = self._done, self._total
        share = f"{done:,} of {total:,} ({done / max(total, 1):.0%})"
        if self._in_bytes:
            share = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / seconds / 1e9:.2f} GB/s"
        left = timedelta(seconds=round(seconds * (total - done) / max(done, 1)))
        return f"{self._what}: {share}, ETA {left}"

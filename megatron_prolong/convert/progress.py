"""Progress of a transfer: a bar with bytes, GB/s and time left on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

_LINE_EVERY_SECONDS = 10.0


@contextlib.contextmanager
def byte_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a thread-safe function to call with the number of bytes just done. Writes to stderr."""
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield lambda count: bar.advance(task, count)
    else:
        yield _Lines(title, total_bytes).advance


class _Lines:
    """Prints a line every ten seconds; a transfer that takes less prints none."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title, self._total = title, total_bytes
        self._done = 0
        self._started = self._printed = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._printed < _LINE_EVERY_SECONDS:
                return
            self._printed = now
            speed = self._done / (now - self._started)
            left = (self._total - self._done) / speed
            print(
                f"{self._title}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB,"
                f" {speed / 1e9:.2f} GB/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

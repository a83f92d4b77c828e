"""Progress of long work: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
_SECONDS_BETWEEN_LINES = 10.0


def track(
    items: Iterable[T], total: int, what: str, amount: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Pass the items through while reporting `sum(amount(item))` of `total` on standard error."""
    if not sys.stderr.isatty():
        yield from _lines(items, total, what, amount)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(bar, amount(item))


def _lines(items: Iterable[T], total: int, what: str, amount: Callable[[T], int]) -> Iterator[T]:
    done, started = 0, time.monotonic()
    last = started
    for item in items:
        yield item
        done += amount(item)
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = timedelta(seconds=round((last - started) * (total - done) / max(done, 1)))
            share = f"{done:,} of {total:,} ({done / max(total, 1):.0%})"
            print(f"{what}: {share}, ETA {left}", file=sys.stderr, flush=True)

"""Work that hangs ends the process, with a record of where every thread was.

A collective waits for a rank that will not come; a file system does not answer; threads wait for each other. The
watchdog is a thread that is fed with each step and micro-batch. Behind it stands one of C's (faulthandler), for the
moment when no thread of Python's runs: one that waits for a page of a mapped file keeps the interpreter's lock.

Process groups wait longer (runtime/launch.py), so that the rank that hangs says where, before the others' patience
ends and the launcher with them.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterable

import torch

HANG_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
# Until the first step is made: reading a checkpoint once, compiling. Later this is the longest that is waited.
HANG_SECONDS = 3600.0
# From then on ten of the longest waits so far, but as long as a file system may need to come back.
_SHORTEST_SECONDS = 1200.0
_LONGEST_WAITS = 10
_GRACE_SECONDS = 60.0  # until C's thread takes over
_STDERR = 2


class Watchdog:
    """Ends the process when `feed` has not been called for too long.

    with Watchdog(rank) as watchdog:
        for step in ...:
            watchdog.feed(step)

    Args:
        rank: named in the message.
        timeout_seconds: how long is too long, until steps show what is usual.
        start: what is being worked on before the first step, for messages.
    """

    def __init__(self, rank: int, timeout_seconds: float = HANG_SECONDS, start: str = "the start") -> None:
        assert timeout_seconds > 0
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self._start = start
        self._step: int | None = None
        self._longest = 0.0  # from one feeding to the next
        self._fed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def feed(self, step: int | None = None) -> None:
        """Say that work on `step` begins now, or that work on the current one goes on."""
        now = time.monotonic()
        if self._step is not None:
            self._longest = max(self._longest, now - self._fed)
        self._step, self._fed = self._step if step is None else step, now
        self._wait_in_c()

    def feed_with(self, modules: Iterable[torch.nn.Module]) -> None:
        """Whenever a forward pass of one of them begins, work goes on."""
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.feed())

    @property
    def where(self) -> str:
        """What was being worked on, for messages."""
        return self._start if self._step is None else f"step {self._step}"

    @property
    def patience(self) -> float:
        """Seconds that may pass now until it is fed."""
        if self._step is None:
            return self.timeout_seconds
        return min(self.timeout_seconds, max(_SHORTEST_SECONDS, _LONGEST_WAITS * self._longest))

    def __enter__(self) -> Watchdog:
        self._thread.start()
        self._wait_in_c()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._stop.set()
        self._thread.join()

    def _wait_in_c(self) -> None:
        # To the file itself: sys.stderr may be an object of Python's without one.
        faulthandler.dump_traceback_later(self.patience + _GRACE_SECONDS, exit=True, file=_STDERR)

    def _watch(self) -> None:
        while not self._stop.wait(self._fed + self.patience - time.monotonic()):
            if time.monotonic() - self._fed >= self.patience:
                self._bite()

    def _bite(self) -> None:
        print(
            f"rank {self.rank} has made no progress for {self.patience:.0f} s in {self.where}; "
            "it stops here so that the job can end. Its threads were at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        # Not sys.exit: the main thread hangs and would never see it.
        os._exit(HANG_EXIT_CODE)

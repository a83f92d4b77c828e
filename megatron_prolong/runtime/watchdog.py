"""A step that hangs ends the process, with a record of where every thread was.

A collective waits for a rank that will not come; the process group's own timeout may be long, switched off,
or not reached (a stuck file system, a deadlock). The watchdog is a thread that is fed with each step and
micro-batch.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

HANG_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class Watchdog:
    """Ends the process when `feed` has not been called for `timeout_seconds`.

    with Watchdog(rank, 1800) as watchdog:
        for step in ...:
            watchdog.feed(step)

    Args:
        rank: named in the message.
        timeout_seconds: much longer than the longest micro-batch, and than saving a checkpoint.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        assert timeout_seconds > 0
        self.rank, self.timeout_seconds = rank, timeout_seconds
        self._step: int | None = None
        self._fed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def feed(self, step: int | None = None) -> None:
        """Say that work on `step` begins now, or that work on the current one goes on."""
        self._step, self._fed = self._step if step is None else step, time.monotonic()

    @property
    def where(self) -> str:
        """What was being worked on, for messages."""
        return "the start" if self._step is None else f"step {self._step}"

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._fed + self.timeout_seconds - time.monotonic()):
            if time.monotonic() - self._fed >= self.timeout_seconds:
                self._bite()

    def _bite(self) -> None:
        print(
            f"rank {self.rank} has made no progress for {self.timeout_seconds:.0f} s in {self.where}; "
            "it stops here so that the job can end. Its threads were at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        # Not sys.exit: the main thread hangs and would never see it.
        os._exit(HANG_EXIT_CODE)

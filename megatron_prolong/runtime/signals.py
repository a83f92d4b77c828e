"""Being asked to stop: a signal becomes a flag that the training loop reads between steps.

Slurm sends SIGTERM (or what `--signal` says) before it takes a job's nodes away. The first signal asks; the
run saves at the next step's end and exits with REQUEUE_EXIT_CODE, on which the batch script requeues itself.
Another one, more than 5 s later, ends the process at once. While the main thread waits in a collective Python runs
no handler in it, so a thread of its own listens for that one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 5.0  # srun and torchrun may both pass one signal on


class StopRequest:
    """Whether somebody has asked this run to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def asked(self) -> bool:
        """Whether this process was."""
        return self.received is not None

    def agreed(self) -> bool:
        """Whether any rank was asked. Collective: every rank gets the same answer at the same place.

        Through the CPU: for this alone NCCL would take memory for a group of all ranks.
        """
        if not dist.is_initialized():
            return self.asked()
        asked = torch.tensor(int(self.asked()))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for STOP_SIGNALS; put back what handled them before. Only in the main thread."""
    request = StopRequest()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_exit_on_the_second, args=(reader,), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # ends the thread


def _exit_on_the_second(reader: int) -> None:
    """Read the numbers of all signals, which the interpreter writes into a pipe as they come."""
    first = None
    while received := os.read(reader, 1):
        if received[0] in STOP_SIGNALS:
            now = time.monotonic()
            first = now if first is None else first
            if now - first >= _SAME_REQUEST_SECONDS:
                # Not sys.exit: a collective or a write may be under way, and nothing may hold us up any more.
                os._exit(128 + received[0])
    os.close(reader)

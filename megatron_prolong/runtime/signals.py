"""Being asked to stop: a signal becomes a flag that the training loop reads between steps.

Slurm sends SIGTERM (or what `--signal` says) before it takes a job's nodes away. The first signal asks; the
run saves at the next step's end and exits with REQUEUE_EXIT_CODE, on which the batch script requeues itself. The
second one ends the process at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether somebody has asked this run to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def agreed(self, device: torch.device | None = None) -> bool:
        """Whether any rank was asked. Collective: every rank gets the same answer at the same step.

        Args:
            device: where the default process group can reduce; default CPU.
        """
        if not dist.is_initialized():
            return self.received is not None
        asked = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            # Not sys.exit: a collective or a write may be under way, and nothing may hold us up any more.
            os._exit(128 + number)
        self.received = signal.Signals(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for STOP_SIGNALS; put back what handled them before. Only in the main thread."""
    request = StopRequest()
    before = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

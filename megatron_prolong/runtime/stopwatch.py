"""How long something takes on a device. A GPU is timed by events of its own: it works behind the host."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Times what lies between `start` and `stop`, which do not wait for a GPU; can be used again and again."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else None
        self._times = [0.0, 0.0]

    def start(self) -> None:
        """From here on."""
        self._mark(0)

    def stop(self) -> None:
        """Up to here."""
        self._mark(1)

    def seconds(self) -> float:
        """Of the latest round; waits for the GPU."""
        if self._events is None:
            return self._times[1] - self._times[0]
        started, stopped = self._events
        stopped.synchronize()
        return float(started.elapsed_time(stopped)) / 1e3

    def _mark(self, which: int) -> None:
        if self._events is None:
            self._times[which] = time.perf_counter()
        else:
            self._events[which].record(torch.cuda.current_stream(self._device))

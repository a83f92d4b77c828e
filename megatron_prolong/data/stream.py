"""Reads global batches ahead of training in a background thread, so that a step never waits for a disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import TypeVar

from megatron_prolong.data.mixture import Mixture
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.runtime.passing import patiently

T = TypeVar("T")

_STEPS_AHEAD = 2  # one being read while one waits; 8M tokens of a step are 32 MiB


def stream(
    mixture: Mixture, first_step: int, prepare: Callable[[list[PackedSequence]], T]
) -> Iterator[tuple[int, T]]:
    """(step, what `prepare` makes of its global batch) for every step from first_step to the end of the run.

    Every rank reads it all, as documents are dealt to ranks by their lengths (data/balance), not by sequences.
    The thread reads and decompresses with numpy only, and lets go of the interpreter while doing so; then it calls
    `prepare`. An error in it is raised here at the step it belongs to, after further tries where reading may meet
    one that passes. Closing the generator (or dropping it) ends the thread.
    """

    def read(step: int) -> T:
        what = f"reading the data of step {step + 1}"
        refs = mixture.batch(step)
        return prepare([patiently(partial(mixture.read, ref), what, closed.wait) for ref in refs])

    waiting: deque[Future[T]] = deque()
    closed = Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        submitted = first_step
        for step in range(first_step, mixture.num_steps):
            while submitted < min(step + 1 + _STEPS_AHEAD, mixture.num_steps):
                waiting.append(pool.submit(read, submitted))
                submitted += 1
            yield step, waiting.popleft().result()
    finally:
        closed.set()
        pool.shutdown(wait=True, cancel_futures=True)

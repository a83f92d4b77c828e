"""Python's garbage collector, run by all ranks at the same moment.

Left alone it interrupts each rank when it likes, and every other rank waits at the next collective (Megatron-LM's
--manual-gc, torchtitan's GarbageCollection).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Inside, only `gc.collect()` collects garbage; it is quick, for it skips what was there at the start."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

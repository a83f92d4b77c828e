"""How many cores this process may use."""

import os


def usable_cores() -> int:
    """Fewer than the machine has, in a batch job or a container that was given a part of it."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

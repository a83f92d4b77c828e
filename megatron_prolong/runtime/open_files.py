"""How many files a process may have open: shells allow 1,024, fewer than a large job has sockets or shards."""

from __future__ import annotations

import resource


def allow_open_files() -> int:
    """Raise the limit to what the administrator permits; returns it."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except OSError:  # the kernel's own limit was lowered below it
        return now
    return most

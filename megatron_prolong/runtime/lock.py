"""One run per directory: the second one is refused.

The lock is the operating system's, on `<directory>/.lock`, so it goes with the process that holds it, however
that dies, and a dead process's lock is never in the way. The file only says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from megatron_prolong.errors import UserError

LOCK = ".lock"


class DirectoryLock:
    """Held from `acquire` (or entering `with`) to `release`. One process of a job takes it: rank 0."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, also after a process that died.

        Raises:
            UserError: another process holds it, or the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot be locked for this run: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            file.close()
            raise UserError(
                f"{self.path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}: "
                "two runs on one directory would destroy each other's checkpoints; wait for it, stop it, or "
                "choose another run_dir"
            ) from None
        except OSError as error:
            file.close()
            raise UserError(f"{self.path}: this file system has no locks: {error}") from error
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others have it. The file stays, emptied: removing it would race with the next to lock it."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _read(file: IO[str]) -> dict[str, Any]:
    """Who holds the lock; empty while they are still writing it."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}

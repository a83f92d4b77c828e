"""One run per directory: the second one is refused.

The lock is the operating system's, on `<directory>/.lock`, so it goes with the process that holds it, however
that dies. Only where a whole node died does the file server keep its locks for some minutes, which are waited for:
the job may be back from the queue sooner. The file only says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import is_alive_here

LOCK = ".lock"
# Lustre evicts a node that is gone after one to five minutes, NFS forgets it after 90 s.
_WAIT_SECONDS = 300.0
_LOOK_SECONDS = 5.0


class DirectoryLock:
    """Held from `acquire` (or entering `with`) to `release`. One process of a job takes it: rank 0."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, also after a process that died.

        Raises:
            UserError: another process holds it, which is alive on this machine or does not let go for some minutes;
                or the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path.parent}: cannot be locked for this run: {error.strerror}") from error
        try:
            self._lock(file)
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        self._file = file

    def _lock(self, file: IO[str]) -> None:
        deadline, said = time.monotonic() + _WAIT_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = _read(file)
            except OSError as error:
                raise UserError(f"{self.path}: this file system has no locks: {error}") from error
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            in_use = f"{self.path.parent} is in use by {who}"
            if time.monotonic() >= deadline or _is_alive_here(holder):
                raise UserError(
                    f"{in_use}: two runs on one directory would destroy each other's checkpoints; wait for it, "
                    "stop it, or choose another run_dir"
                )
            if not said:
                minutes = _WAIT_SECONDS / 60
                print(
                    f"{in_use}; waiting for {minutes:g} minutes, in case that node is gone", file=sys.stderr
                )
                said = True
            time.sleep(_LOOK_SECONDS)

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


def _is_alive_here(holder: dict[str, Any]) -> bool:
    host, pid = holder.get("host"), holder.get("pid")
    return isinstance(host, str) and isinstance(pid, int) and is_alive_here(host, pid)


def _read(file: IO[str]) -> dict[str, Any]:
    """Who holds the lock; empty while they are still writing it."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}

"""Two runs on one directory: the second is refused; a dead holder's lock is free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.lock import DirectoryLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_prolong.runtime.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_run_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()}"):
            DirectoryLock(tmp_path).acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with DirectoryLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid(), "and of no one else"


def test_released_and_taken_again(tmp_path):
    for _ in range(2):
        with DirectoryLock(tmp_path / "new" / "run"), pytest.raises(UserError, match=str(os.getpid())):
            DirectoryLock(tmp_path / "new" / "run").acquire()


def test_what_is_released_is_free_and_names_nobody(tmp_path):
    first = DirectoryLock(tmp_path)
    with first:
        pass
    assert first.path.read_text() == ""
    with DirectoryLock(tmp_path):
        first.release()  # once more: it must not empty the file of the one who holds it now
        assert json.loads(first.path.read_text())["pid"] == os.getpid()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        DirectoryLock(tmp_path / "file" / "run").acquire()

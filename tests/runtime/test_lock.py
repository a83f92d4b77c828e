"""Two runs on one directory: the second is refused; a dead holder's lock is free."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.runtime import lock
from megatron_prolong.runtime.lock import DirectoryLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_prolong.runtime.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_run_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("it is plainly alive"))
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


def held_by_a_node_that_died(directory: Path) -> DirectoryLock:
    held = DirectoryLock(directory)
    held.acquire()
    held.path.write_text('{"pid": 1, "host": "gone"}')
    return held


def test_the_lock_of_a_node_that_died_is_waited_for(tmp_path, monkeypatch, capsys):
    """A job that came back from the queue was refused, with an exit code that ends it."""
    held, slept = held_by_a_node_that_died(tmp_path), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            held.release()  # as the file server does when it has missed the node for long enough

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with DirectoryLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert len(slept) == 3 and said.count("\n") == 1
    assert "is in use by process 1 on gone; waiting for 5 minutes" in said


def test_it_is_not_waited_for_without_end(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    held = held_by_a_node_that_died(tmp_path)
    with pytest.raises(UserError, match="is in use by process 1 on gone: two runs"):
        DirectoryLock(tmp_path).acquire()
    assert now == [300] and capsys.readouterr().err.count("\n") == 1
    held.release()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run"):
        DirectoryLock(tmp_path / "file" / "run").acquire()

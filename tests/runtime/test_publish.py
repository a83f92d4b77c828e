"""Files and directories that are whole or not there, and what killed processes left of them."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prolong.runtime.publish import (
    is_disk_full,
    is_temporary,
    no_room,
    publish,
    remove,
    remove_leftovers,
    temporary_name,
    wanted_name,
    whole_file,
    write_durably,
)


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "new" / "folder" / "file"
    write_durably(final, "ü")
    with pytest.raises(ValueError, match="half"), whole_file(final) as temporary:
        temporary.write_text("half")
        assert final.read_text(encoding="utf-8") == "ü"
        raise ValueError("half")
    assert final.read_text(encoding="utf-8") == "ü" and list(final.parent.iterdir()) == [final]
    write_durably(final, "other")
    assert final.read_text() == "other"


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """Not an error of something else that the block does, such as a question to a server."""
    for error, name in (
        (OSError(errno.ENOSPC, "No space left on device"), str(tmp_path / "file")),
        (ConnectionResetError(errno.ECONNRESET, "reset"), None),
    ):
        with pytest.raises(OSError) as raised, whole_file(tmp_path / "file"):
            raise error
        assert raised.value.filename == name


def test_a_directory_does_not_replace_what_another_has_made(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    partial = temporary_name(final)
    (partial / "a").mkdir(parents=True)
    publish(partial, final)  # over an empty one
    assert (final / "a").is_dir()
    (partial / "b").mkdir(parents=True)
    with pytest.raises(OSError, match="not empty"):
        publish(partial, final)
    assert [path.name for path in final.iterdir()] == ["a"]
    remove(final)
    assert list(tmp_path.iterdir()) == [partial]


def test_leftovers_go_but_not_what_is_being_made_or_is_not_ours(tmp_path: Path, dead_pid: int) -> None:
    host = socket.gethostname()
    dead, elsewhere = f"out.tmp-prolong-{host}-{dead_pid}", f"out.tmp-prolong-node-7-{os.getpid()}"
    living, other = f"out.tmp-prolong-{host}-{os.getpid()}", f"else.tmp-prolong-{host}-{dead_pid}"
    for name in (dead, living, other):
        (tmp_path / name / "in").mkdir(parents=True)
    for name in (elsewhere, "out.tmp-prolong-mine", "out.tmp-copy-1", "out"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "out")
    assert {path.name for path in tmp_path.iterdir()} == {
        living,
        other,
        "out.tmp-prolong-mine",
        "out.tmp-copy-1",
        "out",
    }
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        living,
        "out.tmp-prolong-mine",
        "out.tmp-copy-1",
        "out",
    }


def test_names_of_unfinished_things_are_not_shown(tmp_path: Path) -> None:
    unfinished = temporary_name(tmp_path / "out") / "file"
    assert wanted_name(str(unfinished)) == str(tmp_path / "out" / "file")
    assert is_temporary(unfinished, tmp_path) and not is_temporary(unfinished, unfinished.parent)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used up"), (errno.EFBIG, "ulimit -f")],
)
def test_what_leaves_no_room_is_seen_behind_other_errors(number: int, said: str) -> None:
    full = OSError(number, os.strerror(number))
    behind, raised = RuntimeError("unexpected pos"), RuntimeError("no zip")
    behind.__context__, raised.__cause__ = full, behind
    for error in (full, raised):
        assert said in (no_room(error) or "") and is_disk_full(error)


def test_other_errors_are_of_no_full_disk() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "no")) and no_room(None) is None

"""Progress in a log and on a terminal."""

from __future__ import annotations

import pytest

from megatron_prolong.runtime import progress as progress_module
from megatron_prolong.runtime.progress import progress, track


def test_a_log_gets_lines_of_items_or_of_bytes(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    assert list(track([3, 7], 10, "reading", amount=int)) == [3, 7]
    with progress("copying", 4 * 10**9, in_bytes=True) as advance:
        advance(10**9)
    first, second, copied = capsys.readouterr().err.splitlines()
    assert first.startswith("reading: 3 of 10 (30%), ETA ")
    assert second == "reading: 10 of 10 (100%), ETA 0:00:00"
    assert copied.startswith("copying: 1.0 of 4.0 GB, ") and " GB/s, ETA " in copied


def test_what_is_left_is_told_from_the_time_so_far(monkeypatch, capsys):
    clock = iter([1000.0, 1009.0, 1020.0, 1029.0, 1040.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert list(track("abcd", 40, "reading", amount=lambda _: 5)) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 10 of 40 (25%), ETA 0:01:00",
        "reading: 20 of 40 (50%), ETA 0:00:40",
    ]


def test_short_work_prints_no_line(capsys):
    assert list(track("abc", 3, "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("in_bytes", [False, True])
def test_a_terminal_gets_a_bar(monkeypatch, capsys, in_bytes):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("working", 10, in_bytes=in_bytes) as advance:
        advance(10)
    assert "working" in capsys.readouterr().err

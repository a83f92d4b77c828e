"""A rank that dies takes the job down within seconds, and the survivors say what happened and when."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest


@pytest.mark.parametrize("layout", ["layout.cp=2", "layout.pp=2"])
def test_the_others_fail_with_rank_and_step(workspace, layout):
    run = f"lost-{layout[-4:-2]}"
    ranks = workspace.start_ranks(run, layout, "checkpoint.every=1000", "stage.short.steps=100000")
    try:
        wait_for_step(workspace.root / run / "metrics.jsonl", 3, ranks)
        ranks[1].send_signal(signal.SIGKILL)
        _, errors = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1
    message = re.search(
        r"^error: rank 0 lost another rank in step (\d+) of stage short", errors, re.MULTILINE
    )
    assert message and int(message[1]) >= 3, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("step", [0, 3])
def test_processes_whose_launcher_is_killed_save_and_stop(workspace, step):
    """They waited half an hour for each other, or trained on, and failed at the next stage as if one were lost."""
    run = f"orphans-{step}"
    every = "checkpoint.every=1000"
    launcher = workspace.start(run, every, "stage.short.steps=100000", "layout.cp=2", "--processes=2")
    ranks = []
    try:
        while len(ranks := psutil.Process(launcher.pid).children()) < 2 and launcher.poll() is None:
            time.sleep(0.01)
        if step:
            wait_for_step(workspace.root / run / "metrics.jsonl", step, [launcher])
        while any("libtorch" not in Path(f"/proc/{rank.pid}/maps").read_text() for rank in ranks):
            time.sleep(0.01)
        launcher.kill()
        output, _ = launcher.communicate(timeout=60)  # until the ranks have ended, which hold the pipe too
    finally:
        for process in (launcher, *ranks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert len(ranks) == 2
    assert ("of stage short; continue with the same command" in output) == (step > 0)
    assert (workspace.root / run / "short/latest").exists() == (step > 0)


def wait_for_step(metrics, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)

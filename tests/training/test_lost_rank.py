"""A rank that dies takes the job down within seconds, and the survivors say what happened and when."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from contextlib import suppress

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


def test_processes_whose_launcher_is_killed_save_and_stop(workspace):
    """They trained on, held the run directory, and failed at the next stage as if a rank were lost."""
    every = "checkpoint.every=1000"
    launcher = workspace.start("orphans", every, "stage.short.steps=100000", "layout.cp=2", "--processes=2")
    ranks = []
    try:
        wait_for_step(workspace.root / "orphans/metrics.jsonl", 3, [launcher])
        ranks = psutil.Process(launcher.pid).children()
        launcher.kill()
        output, _ = launcher.communicate(timeout=60)  # until the ranks have ended, which hold the pipe too
    finally:
        for process in (launcher, *ranks):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert "of stage short; continue with the same command" in output
    assert (workspace.root / "orphans/short/latest").exists()


def wait_for_step(metrics, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)

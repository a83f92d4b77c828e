"""A rank that dies takes the job down within seconds, and the survivors say what happened and when."""

from __future__ import annotations

import re
import signal
import subprocess
import time

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


def wait_for_step(metrics, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)

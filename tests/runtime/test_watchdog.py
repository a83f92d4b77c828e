"""A hanging step ends the process and says where; a fed watchdog stays quiet."""

from __future__ import annotations

import subprocess
import sys
import time

from megatron_prolong.runtime.watchdog import HANG_EXIT_CODE, Watchdog

HANGS = """
import time
from megatron_prolong.runtime.watchdog import Watchdog

def stuck_in_a_collective():
    time.sleep(600)

with Watchdog(rank=3, timeout_seconds=0.5) as watchdog:
    watchdog.feed(41)
    stuck_in_a_collective()
"""


def test_a_hang_ends_the_process_naming_rank_step_and_place():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == HANG_EXIT_CODE
    assert "rank 3" in done.stderr and "step 41" in done.stderr
    assert "stuck_in_a_collective" in done.stderr


def test_feeding_keeps_it_quiet_beyond_the_timeout(monkeypatch):
    bites, looks = [], []
    monkeypatch.setattr(Watchdog, "_bite", lambda self: bites.append(self._step))
    # Fed 20 times as often as needed, so that a busy machine does not fail the test.
    watchdog = Watchdog(rank=0, timeout_seconds=2)
    assert watchdog.where == "the start"
    wait = watchdog._stop.wait
    monkeypatch.setattr(watchdog._stop, "wait", lambda seconds: looks.append(seconds) or wait(seconds))
    with watchdog:
        for step in (1, *[None] * 24):  # one long step of many micro-batches
            watchdog.feed(step)
            time.sleep(0.1)
        assert watchdog.where == "step 1"
    assert not bites
    assert len(looks) < 9, "a thread that looks all the time slows training down"
    assert not watchdog._thread.is_alive()

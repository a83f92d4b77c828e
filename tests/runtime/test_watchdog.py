"""A hanging step ends the process and says where; a fed watchdog stays quiet."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
import torch.distributed as dist

from megatron_prolong.mcore.groups import megatron
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime import watchdog as watchdog_module
from megatron_prolong.runtime.launch import GROUP_TIMEOUT, distributed
from megatron_prolong.runtime.watchdog import HANG_EXIT_CODE, HANG_SECONDS, Watchdog

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


HOLDS_THE_LOCK = """
import ctypes
from megatron_prolong.runtime import watchdog

def reads_a_page_that_does_not_come():
    ctypes.PyDLL(None).sleep(600)  # no thread of Python's runs meanwhile

watchdog._GRACE_SECONDS = 0.5
with watchdog.Watchdog(rank=3, timeout_seconds=0.5):
    reads_a_page_that_does_not_come()
"""


def test_a_hang_that_holds_the_interpreters_lock_ends_too():
    done = subprocess.run([sys.executable, "-c", HOLDS_THE_LOCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "reads_a_page_that_does_not_come" in done.stderr and "no progress" not in done.stderr


def test_steps_show_how_long_is_too_long(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watchdog = Watchdog(rank=0)
    monkeypatch.setattr(watchdog, "_wait_in_c", lambda: None)
    patiences = []
    for seconds, step in [(3000, None), (0, 2), (30, None), (130, 3), (20, 4), (400, 5)]:
        now += seconds
        watchdog.feed(step)
        patiences.append(watchdog.patience)
    assert patiences == [HANG_SECONDS, 1200, 1200, 1300, 1300, HANG_SECONDS]


def test_the_rank_that_hangs_says_so_before_the_others_give_up():
    """Their launcher would end it first. In PyTorch's groups and Megatron's."""
    assert GROUP_TIMEOUT.total_seconds() > HANG_SECONDS + watchdog_module._GRACE_SECONDS
    with distributed(), megatron(Layout(), 1) as groups:
        for group in (groups.tp.group, groups.dp_cp.group, dist.group.WORLD):
            assert group._get_backend(torch.device("cpu")).options._timeout == GROUP_TIMEOUT


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

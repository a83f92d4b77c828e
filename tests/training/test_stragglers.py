"""Slow ranks are told from ranks with more work, from single slow steps and from other pipeline stages."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import numpy as np
import pytest
from test_lost_rank import wait_for_step

from megatron_prolong.training.stragglers import SLOW, WINDOW, Place, Stragglers

PLACES = [Place(f"node{rank // 2}", replica=rank // 2, stage=rank % 2) for rank in range(8)]
PLANNED = [2.0, 1.0, 1.1, 1.2]  # of the four replicas
USUAL = np.repeat(PLANNED, 2) * np.tile([1.0, 0.7], 4)  # the second pipeline stage sees less of a step


def found(seconds: np.ndarray[Any, Any], steps: int = WINDOW) -> tuple[dict[int, float], Stragglers]:
    stragglers = Stragglers(PLACES)
    random = np.random.default_rng(0)
    for _ in range(steps):
        stragglers.note((seconds * random.uniform(0.97, 1.03, 8)).tolist(), PLANNED)
    return stragglers.news(), stragglers


def test_more_work_and_another_stage_are_no_slowness() -> None:
    slow, stragglers = found(USUAL)
    assert not slow
    # Replica 0 has twice the work: the others wait for it, as the plan says.
    assert stragglers.balance == pytest.approx(np.mean(PLANNED) / 2, abs=0.05)


def test_a_slow_node_is_named_once() -> None:
    slower = USUAL * np.where(np.arange(8) // 2 == 3, 1.4, 1.0)
    slow, stragglers = found(slower)
    assert set(slow) == {6, 7} and slow[6] == pytest.approx(1.4, abs=0.1)
    assert "1.4" in stragglers.describe(slow) and "(node3: rank 6, 7)" in stragglers.describe(slow)
    stragglers.note(slower.tolist(), PLANNED)
    assert stragglers.news() == {}


def test_a_rank_that_has_recovered_is_named_again_and_one_that_comes_near_is_not() -> None:
    """A stage takes weeks, and a GPU may be hot every afternoon."""
    stragglers = Stragglers(PLACES)
    found = []
    for times in (1.4, 1.12, 1.4, 1.0, 1.4):
        for _ in range(WINDOW):
            stragglers.note((USUAL * np.where(np.arange(8) == 6, times, 1.0)).tolist(), PLANNED)
        found.append(list(stragglers.news()))
    assert found == [[6], [], [], [], [6]]


def test_it_takes_many_slow_steps() -> None:
    slower = USUAL * np.where(np.arange(8) == 4, SLOW * 2, 1.0)
    assert found(slower, WINDOW - 1)[0] == {}
    _, stragglers = found(USUAL)
    for _ in range(WINDOW // 2 - 1):
        stragglers.note(slower.tolist(), PLANNED)
    assert stragglers.news() == {}
    for _ in range(2):
        stragglers.note(slower.tolist(), PLANNED)
    assert set(stragglers.news()) == {4}


def test_ranks_with_little_or_nothing_to_do_are_not_judged() -> None:
    stragglers = Stragglers(PLACES)
    for _ in range(WINDOW):
        stragglers.note([1.0] * 8, [1.0, 1.0, 0.1, 0.0])
    assert stragglers.news() == {} and stragglers.balance == 1.0


def test_a_throttled_rank_of_a_run_is_told(workspace: Any) -> None:
    """A process that is stopped most of the time, as a GPU that is too hot computes more slowly."""
    ranks = workspace.start_ranks("throttled", "checkpoint.every=1000", "stage.short.steps=100000")
    metrics = workspace.root / "throttled/metrics.jsonl"
    try:
        wait_for_step(metrics, 1, ranks)
        deadline = time.monotonic() + 120
        while "slow_ranks" not in metrics.read_text():
            assert time.monotonic() < deadline
            ranks[1].send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            ranks[1].send_signal(signal.SIGCONT)
            time.sleep(0.02)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    (event,) = [record for record in records if record.get("event") == "slow_ranks"]
    assert event["ranks"].keys() == {"1"} and event["ranks"]["1"] > SLOW
    assert min(record["balance"] for record in records if "loss" in record) < 0.9

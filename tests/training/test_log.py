"""What a run writes about itself."""

from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from unittest.mock import Mock, call

import pytest
from rich.console import Console

from megatron_prolong.runtime.strict_json import read_lines
from megatron_prolong.training.log import RunLog


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_numbers_that_are_none_are_null_in_the_log(metrics: Path) -> None:
    """Most readers of JSON refuse NaN and Infinity, which Python's would write."""
    log = RunLog(Console(file=io.StringIO()), metrics, Mock())
    log.event("step", loss=math.nan, domains={"books": math.inf, "code": 2.5}, names=["a", None])
    written = json.loads(metrics.read_text(), parse_constant=pytest.fail)
    assert written["loss"] is None and written["domains"] == {"books": None, "code": 2.5}
    assert written["names"] == ["a", None]


def test_a_line_stays_one_line_with_what_is_in_it(metrics: Path) -> None:
    """Or a path is cut in two where nobody watches, and cannot be searched for."""
    shown = io.StringIO()
    log = RunLog(Console(file=shown), metrics, Mock())
    line = f"starts with weights of /runs/[64k]/{'x' * 200}"
    log.say(line)
    assert shown.getvalue() == line + "\n"


FACTS = {"loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_second": 12345.6, "step_seconds": 90.0}


def test_a_step_is_recorded_everywhere_and_shown_where_it_is_asked_for(metrics: Path) -> None:
    shown = io.StringIO()
    log = RunLog(Console(file=shown), metrics, Mock(), Mock())
    with log.stage("64k", 2, 50):
        log.step("64k", 3, 50, FACTS | {"domains": {"books": 7}}, show=False)
        assert shown.getvalue() == ""
        log.step("64k", 4, 50, FACTS, show=True)
    assert shown.getvalue() == "64k 4/50  loss 2.5000  lr 1.00e-04  grad 0.50  12,346 tok/s  ETA 1:09:00\n"
    first, second = (json.loads(line) for line in metrics.read_text().splitlines())
    assert first.items() >= (FACTS | {"stage": "64k", "step": 3, "domains": {"books": 7}}).items()
    assert second["step"] == 4
    assert log.tensorboard.add_scalar.call_args_list == [
        call(f"64k/{name}", value, step) for step in (3, 4) for name, value in FACTS.items()
    ]
    log.wandb.log.assert_called_with(
        {"64k/step": 4} | {f"64k/{name}": value for name, value in FACTS.items()}
    )


def test_a_terminal_has_a_bar_in_place_of_lines(metrics: Path) -> None:
    shown = io.StringIO()
    log = RunLog(Console(file=shown, force_terminal=True, color_system=None, width=120), metrics, Mock())
    with log.stage("64k", 2, 50):
        log.step("64k", 3, 50, FACTS, show=True)
        assert log.progress is not None and log.progress.tasks[0].completed == 3
    assert "3/50 loss 2.5000" in shown.getvalue() and "64k 3/50" not in shown.getvalue()
    log.step("64k", 4, 50, FACTS, show=True)
    assert "64k 4/50  loss" in shown.getvalue(), "the bar has gone"


def test_the_bar_gives_way_on_a_narrow_terminal_not_the_number_of_steps(metrics: Path) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system=None, width=80)
    log = RunLog(terminal, metrics, Mock())
    with log.stage("64k", 2, 500):
        log.step("64k", 3, 500, FACTS, show=True)
    assert "  3/500 loss 2.5000  lr 1.00e-04  grad 0.50  12,346 tok/s  ETA 12:" in shown.getvalue()


def test_the_time_left_is_told_of_steps_that_take_minutes_on_a_terminal_too(metrics: Path) -> None:
    shown = io.StringIO()
    log = RunLog(Console(file=shown, force_terminal=True, color_system=None, width=120), metrics, Mock())
    with log.stage("512k", 0, 50):
        for step in (1, 2):
            log.step("512k", step, 50, FACTS, show=True)
    assert "ETA 1:12:00" in shown.getvalue()


def test_one_odd_step_does_not_move_the_time_left(metrics: Path) -> None:
    shown = io.StringIO()
    log = RunLog(Console(file=shown), metrics, Mock())
    with log.stage("512k", 0, 10):
        for step, seconds in enumerate([60.0, 60.0, 600.0, 6.0], 1):
            log.step("512k", step, 10, FACTS | {"step_seconds": seconds}, show=step > 2)
    assert [line.split("ETA ")[1] for line in shown.getvalue().splitlines()] == ["0:07:00", "0:06:00"]


def test_steps_of_the_stage_before_tell_nothing_of_the_time_left(metrics: Path) -> None:
    """They were shorter, by the square of the length."""
    shown = io.StringIO()
    log = RunLog(Console(file=shown), metrics, Mock())
    for stage, seconds in (("64k", 10.0), ("64k", 10.0), ("512k", 60.0)):
        with log.stage(stage, 0, 2):
            log.step(stage, 1, 2, FACTS | {"step_seconds": seconds}, show=True)
    assert shown.getvalue().endswith("ETA 0:01:00\n")


def test_scores_and_steps_passed_over_are_recorded_and_shown(metrics: Path) -> None:
    shown = io.StringIO()
    log = RunLog(Console(file=shown), metrics, Mock())
    log.evaluation("64k", 50, {"recall/65536": 98.76543})
    log.skipped("64k", 51, 60, {"tokens": 7})
    evaluation, skipped = (json.loads(line) for line in metrics.read_text().splitlines())
    assert evaluation.items() >= {"event": "evaluation", "stage": "64k", "step": 50}.items()
    assert evaluation["scores"] == {"recall/65536": 98.76543}
    assert skipped.items() >= {"stage": "64k", "step": 51, "tokens": 7}.items() and "loss" not in skipped
    assert log.tensorboard.add_scalar.call_args_list == [call("64k/evaluation/recall/65536", 98.76543, 50)]
    assert shown.getvalue() == ("64k 50 evaluation: recall/65536 98.77\n64k 51/60  skipped (skip_steps)\n")


def test_a_log_that_cannot_be_written_stops_no_training(
    metrics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fault ended the run. What could not be written is written later, behind half a line that was."""
    shown, full = io.StringIO(), OSError(errno.ENOSPC, "No space left on device")
    tensorboard = Mock(add_scalar=Mock(side_effect=full))
    log = RunLog(Console(file=shown), metrics, tensorboard)
    log.event("start")

    class Half(io.StringIO):
        def write(self, text: str) -> int:
            with opened(metrics, "a") as file:
                file.write(text[:10])
            raise full

    opened = Path.open
    with monkeypatch.context() as while_it_is_full:
        while_it_is_full.setattr(Path, "open", lambda *_: Half())
        for step in (1, 2):
            log.step("64k", step, 3, FACTS, show=False)
    log.step("64k", 3, 3, FACTS, show=False)
    assert [record.get("step") for record in read_lines(metrics)] == [None, 1, 2, 3]
    assert tensorboard.add_scalar.call_count == 1
    said = shown.getvalue().splitlines()
    assert [line[:34] for line in said] == [
        "warning: metrics.jsonl cannot be w",
        "warning: tensorboard cannot be wri",
    ]

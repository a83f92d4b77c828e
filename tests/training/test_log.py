"""What a run writes about itself."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from megatron_prolong.training.log import RunLog


def test_numbers_that_are_none_are_null_in_the_log() -> None:
    """Most readers of JSON refuse NaN and Infinity, which Python's would write."""
    nowhere: Any = io.StringIO()
    log = RunLog(Console(file=io.StringIO()), io.StringIO(), nowhere)
    log.event("step", loss=math.nan, domains={"books": math.inf, "code": 2.5}, names=["a", None])
    written = json.loads(log.metrics.getvalue(), parse_constant=pytest.fail)  # type: ignore[attr-defined]
    assert written["loss"] is None and written["domains"] == {"books": None, "code": 2.5}
    assert written["names"] == ["a", None]


def test_a_line_stays_one_line_with_what_is_in_it() -> None:
    """Or a path is cut in two where nobody watches, and cannot be searched for."""
    shown, nowhere = io.StringIO(), io.StringIO()
    log = RunLog(Console(file=shown), nowhere, nowhere)  # type: ignore[arg-type]
    line = f"starts with weights of /runs/[64k]/{'x' * 200}"
    log.say(line)
    assert shown.getvalue() == line + "\n"

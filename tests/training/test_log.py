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

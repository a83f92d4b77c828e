"""What is written as JSON can be read by every reader."""

import json
import math
from dataclasses import dataclass

from megatron_prolong.runtime.strict_json import dumps, read_lines, with_nan, write_json


@dataclass
class Score:
    loss: float
    by_length: list[float]


def test_what_is_not_finite_is_null_at_any_depth(tmp_path):
    value = {"a": Score(math.nan, [1.5, math.inf]), "b": (None, "ü")}
    expected = {"a": {"loss": None, "by_length": [1.5, None]}, "b": [None, "ü"]}
    assert json.loads(dumps(value)) == expected
    write_json(tmp_path / "scores.json", value)  # of a model whose logits are NaN
    assert json.loads((tmp_path / "scores.json").read_text()) == expected


def test_lines_that_a_killed_process_left_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_lines(path)) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n\xff\n{"step": 4}\n{"st')
    assert list(read_lines(path)) == [{"step": 1}, {"step": 4}]


def test_what_was_written_as_null_is_nan_again():
    back = with_nan(json.loads(dumps({"loss": math.nan, "step": 3, "name": "a"})))
    assert math.isnan(back.pop("loss")) and back == {"step": 3, "name": "a"}

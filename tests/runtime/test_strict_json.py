"""What is written as JSON can be read by every reader."""

import json
import math
from dataclasses import dataclass

from megatron_prolong.evaluation.report import write_json
from megatron_prolong.runtime.strict_json import dumps


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

"""Learning rates against the formula of the paper's scripts."""

import math
from itertools import pairwise

import pytest

from megatron_prolong.recipe.schema import Stage
from megatron_prolong.training.schedule import learning_rate


def stage(**changes):
    fields = {
        "name": "s", "sequence_length": 64, "batch_tokens": 64, "steps": 100, "lr": 2.0, "mixture": "mock",
    }  # fmt: skip
    return Stage(**(fields | changes))


def test_warmup_then_cosine_to_the_floor():
    rates = [learning_rate(stage(), step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[9] == 2.0 and rates[99] == pytest.approx(0.2)
    third = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 30 / 90))  # half-way, cosine and line would meet
    assert rates[39] == pytest.approx(third)
    assert all(earlier > later for earlier, later in pairwise(rates[9:]))


def test_linear_and_constant():
    assert learning_rate(stage(schedule="linear"), 39) == pytest.approx(2.0 * (0.1 + 0.9 * 2 / 3))
    assert learning_rate(stage(schedule="constant", warmup=0), 0) == 2.0
    assert learning_rate(stage(schedule="constant"), 99) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_stage_of_one_step_is_warm_on_it(schedule):
    assert learning_rate(stage(steps=1, schedule=schedule), 0) == 2.0

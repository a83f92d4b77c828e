"""When a run is stopped, and what the message names."""

import math

import numpy as np
import pytest

from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.errors import UserError
from megatron_prolong.training.guard import MAX_SKIPS_IN_A_ROW, SPIKE_WINDOW, Guard
from megatron_prolong.training.step import StepMetrics

SAMPLE = PackedSequence(
    np.zeros(4, np.uint32), np.array([0, 4], np.int64), None, Identity("books", "shard.00003.mds", 17)
)


def metrics(loss: float) -> StepMetrics:
    return StepMetrics(loss, grad_norm=1.0, lr=1e-3, num_targets=3, updated=math.isfinite(loss))


def test_single_bad_steps_are_forgiven_and_many_in_a_row_are_not():
    guard = Guard("64k")
    for _ in range(3):
        for _ in range(MAX_SKIPS_IN_A_ROW - 1):
            guard.check(metrics(math.nan), [SAMPLE])
        guard.check(metrics(2.0), [SAMPLE])
    with pytest.raises(
        UserError, match=r"64k: 5 steps in a row(?s:.*)books, shard shard\.00003\.mds, sample 17"
    ):
        for _ in range(MAX_SKIPS_IN_A_ROW):
            guard.check(metrics(math.inf), [SAMPLE])


def test_a_spike_stops_the_run_but_a_high_start_does_not():
    guard = Guard("64k")
    for step in range(SPIKE_WINDOW):
        guard.check(metrics(11.0 - 8 * step / SPIKE_WINDOW), [SAMPLE])
    guard.check(metrics(5.0), [SAMPLE])
    with pytest.raises(UserError, match=r"loss 30\.00"):
        guard.check(metrics(30.0), [SAMPLE])

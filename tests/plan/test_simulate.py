"""What playing batches through a layout says of its steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_shapes import LLAMA3_8B

from megatron_prolong.plan.batches import Batches
from megatron_prolong.plan.hardware import find_gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.simulate import Simulation, simulate
from megatron_prolong.recipe.schema import Layout

JOB = Job(LLAMA3_8B, Layout(tp=4), 8, 2**16, 4)  # dp 2
LONG, SHORT = np.array([2**16]), np.full(16, 2**12)


def test_the_slowest_tenth_and_the_slowest_step() -> None:
    seconds = Simulation(np.arange(11.0)[::-1], 1.0, 1.0).percentiles()
    assert seconds == {"median": 5.0, "p90": 9.0, "max": 10.0}


def test_documents_dealt_by_cost_wait_less_than_sequences_in_the_order_drawn() -> None:
    """Of four sequences the first and third go to one rank: both long ones, or one of each kind."""
    uneven, even = (
        simulate(JOB, find_gpu("h100-80g"), Batches([order], ""))
        for order in ([LONG, SHORT, LONG, SHORT], [LONG, SHORT, SHORT, LONG])
    )
    assert even.utilisation_as_drawn == pytest.approx(1)
    assert 0.5 < uneven.utilisation_as_drawn < 0.9
    assert uneven.utilisation == even.utilisation == pytest.approx(1)
    alone = simulate(replace(JOB, batch_sequences=1), find_gpu("h100-80g"), Batches([[LONG]], ""))
    assert alone.utilisation == alone.utilisation_as_drawn == pytest.approx(0.5)

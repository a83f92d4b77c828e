"""Communication behind computation, as on GPUs: the same training as one process without it.

Ranks have different numbers of micro-batches, and other ones at every step: gradients may travel only behind the
last of them. On CPU nothing overlaps, but Megatron's hooks start and await the same collectives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from small_training import Job, Trained, assemble, train
from test_layouts import assert_equal_weights, pool_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "dp2 replicated": {"dp": 2, "distributed_optimizer": False},
    "pp2 virtual_pp2 dp2": {"pp": 2, "virtual_pp": 2, "dp": 2},
}


def train_overlapped(rank: int, job: Job) -> Trained:
    """`train`, with what Megatron overlaps on a GPU."""
    from megatron_prolong.mcore import build
    from megatron_prolong.mcore.replace import replaced

    config = partial(_overlapped, build.DistributedDataParallelConfig)
    with replaced([(build, "DistributedDataParallelConfig", config)]):
        return train(rank, job)


def _overlapped(config: Any, **options: Any) -> Any:
    options |= {"overlap_grad_reduce": True, "overlap_param_gather": options["use_distributed_optimizer"]}
    return config(**options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_like_one_process(request, name, checkpoint, single):
    expected, expected_weights = single
    ranks = pool_of(request, LAYOUTS[name]).run(train_overlapped, Job(LAYOUTS[name], checkpoint))
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=1e-5)
    assert_equal_weights(assemble(ranks), expected_weights, 1e-5)

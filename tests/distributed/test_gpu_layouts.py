"""Every layout in bf16 on GPUs, one rank to each, trains like one CPU process in fp32: losses, norms, weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from small_training import Job, assemble, train
from test_layouts import (
    BF16_GRAD_NORM,
    BF16_LOSS,
    BF16_WEIGHTS,
    LAYOUTS,
    QUICK_CASES,
    assert_equal_weights,
    num_ranks,
)

pytestmark = pytest.mark.gpu

CASES = [("one", "none"), *((name, "none") for name in LAYOUTS), *QUICK_CASES, ("cp2 p2p", "selective")]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """By their number of ranks."""
    pools = {size: RankPool(size, on_gpus=True) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize(
    ("name", "recompute"), dict.fromkeys(CASES), ids=lambda value: str(value).replace(" ", "-")
)
def test_on_gpus_bf16_stays_within_rounding_of_fp32(pools, name, recompute, checkpoint, single):
    expected, expected_weights = single
    layout = LAYOUTS.get(name, {})
    if torch.cuda.device_count() < num_ranks(layout):
        pytest.skip(f"needs {num_ranks(layout)} GPUs")
    ranks = pools[num_ranks(layout)].run(train, Job(layout, checkpoint, recompute, precision="bf16"))
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=BF16_LOSS)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=BF16_GRAD_NORM)
    assert_equal_weights(assemble(ranks), expected_weights, BF16_WEIGHTS)

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.data.permutation import Permutation, mix


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 100))
def test_every_item_once(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_a_large_one_needs_no_memory() -> None:
    order = Permutation(10**12, 42)
    assert len({order[place] for place in range(0, 10**12, 10**9)}) == 1000


def test_the_order_never_changes_between_releases() -> None:
    """Frozen values: a run must resume into the same order after an upgrade."""
    assert mix(42, 0, 1) == 13151335708014940318
    assert [Permutation(10, 42, 0, 1)[place] for place in range(10)] == [0, 9, 6, 3, 2, 7, 8, 1, 5, 4]
    # Where the halves of a place grow by one bit, and in between.
    assert [Permutation(64, 42)[place] for place in range(6)] == [45, 2, 11, 62, 35, 12]
    assert [Permutation(65, 42)[place] for place in range(6)] == [3, 16, 1, 44, 2, 28]
    assert [Permutation(200, 42)[place] for place in range(6)] == [3, 66, 140, 91, 159, 28]


def test_keys_give_unlike_orders() -> None:
    orders = [tuple(Permutation(50, 42, epoch)[place] for place in range(50)) for epoch in range(100)]
    assert len(set(orders)) == 100
    # Two random orders of 50 agree in one place on average (Poisson); the mean of 99 pairs is 1 ± 0.1.
    agreements = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in pairwise(orders)]
    assert 0.6 < np.mean(agreements) < 1.4


@pytest.mark.parametrize("size", [3, 64, 257])
def test_every_place_is_equally_likely(size: int) -> None:
    """Chi-squared of where item 0 lands over many keys stays below the 99.99% quantile."""
    draws = 60 * size
    counts = np.bincount([Permutation(size, key)[0] for key in range(draws)], minlength=size)
    statistic = ((counts - 60) ** 2 / 60).sum()
    freedom = size - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson–Hilferty
    assert statistic < quantile


def test_outside_is_refused() -> None:
    for place in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, 1)[place]

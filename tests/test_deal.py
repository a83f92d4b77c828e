"""Things dealt out by cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prolong.deal import deal


@settings(max_examples=100)
@given(costs=st.lists(st.integers(1, 10_000), min_size=1, max_size=60), hands=st.sampled_from([1, 2, 4, 8]))
def test_hands_are_even(costs, hands):
    """Graham's bound for longest-first dealing, against the lower bounds on any dealing."""
    loads = np.bincount(deal(costs, hands), costs, minlength=hands)
    pair = sorted(costs, reverse=True)[hands - 1 : hands + 1]  # two of the hands + 1 dearest share a hand
    best_possible = max(sum(costs) / hands, max(costs), sum(pair) if len(pair) == 2 else 0)
    assert max(loads) <= 4 / 3 * best_possible


def test_dearest_first_to_whoever_has_least():
    assert deal([2, 5, 1, 2, 2], 2).tolist() == [1, 0, 0, 1, 1]
    assert deal([], 3).tolist() == []

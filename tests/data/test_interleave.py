from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.data.interleave import Interleave

proportions = st.lists(
    st.one_of(
        st.integers(1, 60).map(lambda percent: percent / 100),
        st.floats(0.001, 1.0, allow_nan=False),
    ),
    min_size=1,
    max_size=9,
)
PROLONG_64K = [0.30, 0.30, 0.03, 0.10, 0.10, 0.04, 0.04, 0.03, 0.03, 0.03]


@given(proportions, st.integers(1, 400))
def test_every_prefix_keeps_the_proportions_within_one_sample(shares: list[float], num_slots: int) -> None:
    interleave = Interleave(shares, num_slots)
    total = sum(Fraction(str(share)) for share in shares)
    bound = 1 - Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else Fraction(0)
    counts = [0] * len(shares)
    for slot in range(num_slots):
        domain, ordinal = interleave[slot]
        assert ordinal == counts[domain]
        counts[domain] += 1
        for number, share in enumerate(shares):
            off = abs(counts[number] - Fraction(str(share)) / total * (slot + 1))
            assert off <= bound, f"domain {number} is off by {off} after {slot + 1} slots"
    assert [interleave.count(number, num_slots) for number in range(len(shares))] == counts


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_longer_run_begins_as_the_shorter_one(first: int, second: int) -> None:
    short, long = sorted((first, second))
    one, other = Interleave(PROLONG_64K, short), Interleave(PROLONG_64K, long)
    assert [one[slot] for slot in range(short)] == [other[slot] for slot in range(short)]


def test_of_domains_that_are_equally_due_the_first_is_served() -> None:
    interleave = Interleave([0.25, 0.25, 0.25, 0.125, 0.125], 8)
    assert [interleave[slot][0] for slot in range(8)] == [0, 1, 2, 3, 4, 0, 1, 2]


def test_prolong_run_is_exact_and_costs_one_period() -> None:
    num_slots = 5000 * 64
    interleave = Interleave(PROLONG_64K, num_slots)
    assert len(interleave._domains) == 100
    assert [interleave.count(d, num_slots) for d in range(10)] == [
        round(share * num_slots) for share in PROLONG_64K
    ]
    picked = np.array([interleave[slot][0] for slot in range(0, num_slots, 997)])
    assert set(picked.tolist()) == set(range(10))


def test_decimals_are_taken_as_written() -> None:
    # 0.1 is not a tenth in binary: as binary fractions the period would be 2**55.
    assert Interleave([0.1, 0.2, 0.7], 1000)._period == 10
    assert Interleave([1e-3, 0.999], 5000)._period == 1000


def test_beyond_the_run_there_is_nothing() -> None:
    with pytest.raises(AssertionError):
        Interleave([1.0], 3)[3]

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prolong.recipe.numbers import (
    format_count,
    parse_count,
    parse_number,
    parse_real,
    parse_steps,
    steps_of,
)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("64K", 65_536),
        ("512k", 524_288),
        ("4M", 4_194_304),
        ("20B", 21_474_836_480),
        ("0.5M", 524_288),
        ("1e3", 1000),
        ("1_000", 1000),
        (125, 125),
        (4.0, 4),
        (" 8K ", 8192),
    ],
)
def test_counts(written: object, value: int) -> None:
    assert parse_count(written) == value
    assert isinstance(parse_count(written), int)


@pytest.mark.parametrize("written", ["3, 7-9", "3,7 - 9,", [3, "7-9"], ("3", "7-9")])
def test_steps(written: object) -> None:
    assert parse_steps(written) == "3, 7-9"
    assert steps_of(parse_steps(written)) == [range(3, 4), range(7, 10)]
    assert steps_of(parse_steps(12)) == [range(12, 13)] and steps_of(parse_steps([])) == []


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("1.28e8", 1.28e8), ("5e5", 5e5), (3, 3.0), ("-.5", -0.5), ("8e6", 8e6)],
)
def test_reals(written: object, value: float) -> None:
    assert parse_real(written) == value
    assert isinstance(parse_real(written), float)


@pytest.mark.parametrize(
    "written",
    ["64Q", "", "K", "010", "-00.5", "1:30", "1e", "4 M M", True, None, [1], "nan", "inf", "1e999", 10**400],
)
def test_what_is_not_a_number_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_number(written)


@pytest.mark.parametrize("written", ["8M", "1.28K ", "20b"])
def test_a_real_has_no_unit(written: object) -> None:
    """A RoPE base of 8M would be 8,388,608, and not the paper's."""
    with pytest.raises(ValueError, match="without a unit"):
        parse_real(written)


@pytest.mark.parametrize("written", ["0.3", 4.5, "1e-3", "1.0001K"])
def test_counts_are_whole(written: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(written)


@given(st.integers(min_value=-(2**60), max_value=2**60))
def test_the_short_spelling_means_the_same(count: int) -> None:
    assert parse_count(format_count(count)) == count


def test_the_short_spelling_is_short() -> None:
    assert [format_count(n) for n in (65_536, 4 * 2**20, 20 * 2**30, 125, 0)] == [
        "64K",
        "4M",
        "20B",
        "125",
        "0",
    ]

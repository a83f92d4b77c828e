"""Where the charts draw what they are given."""

from __future__ import annotations

import math
import re

import pytest

from megatron_prolong.page.charts import WIDTH, Point, lines, scatter, stacked_bars
from megatron_prolong.page.html import figure, heading, note, page, preformatted, table


def pairs(pattern: str, text: str) -> list[tuple[float, float]]:
    return [(float(first), float(second)) for first, second in re.findall(pattern, text)]


def labels(anchor: str, svg: str) -> list[str]:
    """What stands along an axis: below it ("middle") or to its left ("end")."""
    return re.findall(rf'text-anchor="{anchor}" class="soft">([^<]+)<', svg)


def test_bars_are_as_long_as_their_parts_and_the_limit_lies_at_its_value() -> None:
    svg = stacked_bars([("a", {"weights": 1, "kept": 2}), ("b", {"weights": 0.03})], "GB", limit=4)
    pixels = (WIDTH - 330 - 90) / 4
    bars = pairs(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="20"', svg)
    assert bars == [(330, pixels), (330 + pixels, 2 * pixels), (330, pytest.approx(0.03 * pixels))]
    weights, kept = re.findall(r'width="12.0" height="12" fill="(#\w+)"', svg)
    assert re.findall(r'height="20" fill="(#\w+)"', svg) == [weights, kept, weights], "the legend's colours"
    assert pairs(r'<line x1="([\d.]+)" x2="([\d.]+)"', svg) == [(330 + 4 * pixels, 330 + 4 * pixels)]
    for text in (">3.0 GB<", ">0.03 GB<", ">4 GB<", "<title>a: kept 2.00 GB</title>"):
        assert text in svg
    beyond = stacked_bars([("a", {"weights": 8})], "GB", limit=4)
    assert f'width="{4 * pixels:.1f}" height="20"' in beyond, "the longest bar takes the room that there is"


def test_a_line_goes_from_left_to_right_up_with_its_values_and_breaks_where_there_are_none() -> None:
    points = [(1.0, 2.0), (2.0, 3.0), (3.0, math.nan), (4.0, 3.5), (5.0, 4.0)]
    svg = lines({"loss": points}, "step", "loss")
    first, second = re.findall(r'<polyline points="([^"]+)"', svg)
    places = pairs(r"([\d.]+),([\d.]+)", f"{first} {second}")
    assert [x for x, _ in places] == [80, 279, 677, 876]
    low, middle, _, high = (y for _, y in places)
    assert middle - low == pytest.approx((high - low) / 2, abs=0.11) and high < low
    assert labels("middle", svg) == ["1", "2", "3", "4", "5"]
    assert labels("end", svg) == ["2", "2.5", "3", "3.5", "4"]
    assert labels("end", lines({"lr": [(1.0, 0.1), (2.0, 1.0)]}, "step", "lr"))[0] == "0", "zero is not far"
    assert "no values" in lines({"loss": [(1.0, math.nan)]}, "step", "loss")
    assert 'points="80.0,' in lines({"loss": [(7.0, 2.0)]}, "step", "loss"), (
        "a run of one step has a page too"
    )


def test_points_lie_between_zero_and_a_little_beyond_the_largest() -> None:
    svg = scatter([Point(50, 10000, "half"), Point(100, 20000, "most", marked=True)], "GB", "tokens/s")
    half, most = pairs(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    across, bottom = WIDTH - 80 - 24, 420 - 46
    assert half[0] - 80 == pytest.approx(across / 1.05 / 2, abs=0.06)
    assert most[0] - 80 == pytest.approx(across / 1.05, abs=0.06)
    assert bottom - half[1] == pytest.approx((bottom - most[1]) / 2, abs=0.06)
    assert labels("middle", svg) == ["0", "50", "100"] and labels("end", svg) == [
        "0",
        "5000",
        "10K",
        "15K",
        "20K",
    ]
    assert [fill == "#0072B2" for fill in re.findall(r'fill="(#\w+)" fill-opacity', svg)] == [False, True]


def test_what_users_name_is_text_on_a_page() -> None:
    name = "a<b>&c"
    parts = [
        page(name, []), table([name], [[name]]), figure("", name), note(name), heading(name), preformatted(name),
        stacked_bars([(name, {name: 1.0})], name), scatter([Point(1, 1, name)], name, name),
        lines({name: [(1.0, 1.0)]}, name, name),
    ]  # fmt: skip
    for part in parts:
        assert "<b>" not in part and "a&lt;b&gt;&amp;c" in part

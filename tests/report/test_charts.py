"""What the charts draw of what they are given."""

from __future__ import annotations

import math
import re

import matplotlib
import pytest

from megatron_prolong.page.charts import COLOURS, Point, lines, scatter, stacked_bars
from megatron_prolong.page.html import figure, heading, note, page, preformatted, table

NUMBER = r"(-?[\d.]+)"


def strokes(colour: str, svg: str) -> list[list[tuple[float, float]]]:
    """Pixels of every unbroken line, and outline of every filled patch, of a colour inside the axes."""
    drawn = re.findall(rf'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*{colour.lower()}', svg)
    return [
        [(float(x), float(y)) for x, y in re.findall(rf"{NUMBER} {NUMBER}", part)]
        for path in drawn
        for part in path.split("M")[1:]
    ]


def spans(colour: str, svg: str) -> list[tuple[float, float]]:
    """From left to right, of the same."""
    return [(min(x for x, _ in points), max(x for x, _ in points)) for points in strokes(colour, svg)]


def test_a_style_of_the_user_s_own_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """LaTeX in a matplotlibrc ended the page where there is none."""

    def drawn() -> str:
        return re.sub(
            r"[mp][0-9a-f]{10}", "", lines({"a": [(1, 2), (2, 3)]}, "step", "loss")
        )  # less random ids

    expected = drawn()
    for name, value in (("text.usetex", True), ("axes.facecolor", "black"), ("font.size", 30)):
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    assert drawn() == expected


def test_bars_are_as_long_as_their_parts_and_the_limit_lies_at_its_value() -> None:
    svg = stacked_bars([("a", {"weights": 1, "kept": 2}), ("b", {"weights": 0.03})], "GB", limit=4)
    first, third = spans(COLOURS[0], svg)
    second, none = spans(COLOURS[1], svg)
    ((limit, _),) = spans("#D55E00", svg)
    pixels = first[1] - first[0]
    assert second == (first[1], pytest.approx(first[1] + 2 * pixels, abs=0.01))
    assert none == (third[1], third[1])
    assert third == (first[0], pytest.approx(first[0] + 0.03 * pixels, abs=0.01))
    assert limit == pytest.approx(first[0] + 4 * pixels, abs=0.01)
    for text in ("3.0 GB<", "0.03 GB<", ">weights<", ">kept<", ">a<", ">b<"):
        assert text in svg


def test_a_line_goes_from_left_to_right_up_with_its_values_and_breaks_where_there_are_none() -> None:
    points = [(1.0, 2.0), (2.0, 3.0), (3.0, math.nan), (4.0, 3.5), (5.0, 4.0)]
    first, second = strokes(COLOURS[0], lines({"loss": points}, "step", "loss"))
    xs, ys = zip(*first, *second, strict=True)
    step = (xs[1] - xs[0]) / 1.0
    assert xs == pytest.approx([xs[0], xs[0] + step, xs[0] + 3 * step, xs[0] + 4 * step], abs=0.01)
    assert ys[0] - ys[1] == pytest.approx((ys[0] - ys[3]) / 2, abs=0.01) and ys[3] < ys[0]


def test_an_axis_starts_at_zero_where_that_is_not_far() -> None:
    assert ">0.0<" in lines({"lr": [(1.0, 0.1), (2.0, 1.0)]}, "step", "lr")
    assert ">0.0<" not in lines({"loss": [(1.0, 2.0), (2.0, 3.0)]}, "step", "loss")
    assert ">0<" in scatter([Point(50, 10000, "half")], "GB", "tokens/s")


def test_a_run_of_one_step_and_one_without_a_finite_loss_are_drawn_too() -> None:
    assert "<use" in lines({"loss": [(7.0, 2.0)]}, "step", "loss").split("legend")[0]
    assert ">loss<" in lines({"loss": [(1.0, math.nan)]}, "step", "loss")


def test_marked_points_are_named_where_there_is_room() -> None:
    points = [Point(9, 100, "fastest", True), Point(8, 99, "as fast", True), Point(2, 50, "small", True)]
    svg = scatter([*points, Point(5, 5, "plain")], "GB", "tokens/s")
    assert ">fastest<" in svg and ">small<" in svg
    assert "as fast" not in svg and "plain" not in svg


def test_what_users_name_is_text_on_a_page() -> None:
    name = "a<b>&c$d$"
    parts = [
        page(name, []), table([name], [[name]]), figure("", name), note(name), heading(name), preformatted(name),
        stacked_bars([(name, {name: 1.0})], name), scatter([Point(1, 1, name, marked=True)], name, name),
        lines({name: [(1.0, 1.0)]}, name, name),
    ]  # fmt: skip
    for part in parts:
        assert "<b>" not in part and "a&lt;b&gt;&amp;c$d$" in part

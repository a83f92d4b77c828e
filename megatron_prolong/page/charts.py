"""Three charts of matplotlib as SVG text: stacked bars, points and lines."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prolong.page.amount import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by readers with any colour vision, and four more; grey last.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7B4FA3", "#A65628", "#1D2430",
    "#8A93A0",
)  # fmt: skip
WIDTH = 9.0  # inches
# Text stays text, and what users name is not read as formulas.
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart; `marked` ones are in colour, and named where there is room."""

    x: float
    y: float
    label: str
    marked: bool = False


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, limit: float | None = None
) -> str:
    """One horizontal bar per row, cut into its named parts; a dashed line at `limit`."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    with _chart(1.0 + 0.28 * len(rows)) as chart:
        axes, ends = chart.axes, [0.0] * len(rows)
        for index, name in enumerate(names):
            values = [parts.get(name, 0.0) for _, parts in rows]
            colour = COLOURS[index % len(COLOURS)]
            axes.barh(range(len(rows)), values, left=ends, height=0.75, color=colour, label=name)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        for row, end in enumerate(ends):
            text = f"{amount(end)} {unit}".rstrip()
            axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center")
        if limit:
            axes.axvline(limit, color="#D55E00", linestyle="--")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set(xlabel=unit, xlim=(0, 1.1 * max([*ends, limit or 0.0])))
    return chart.svg


def scatter(points: Sequence[Point], x_name: str, y_name: str) -> str:
    """Points with axes from zero."""
    with _chart(4.5) as chart:
        for marked, colour, size in ((False, COLOURS[-1], 8), (True, COLOURS[0], 30)):
            chosen = [point for point in points if point.marked is marked]
            chart.axes.scatter([p.x for p in chosen], [p.y for p in chosen], color=colour, s=size)
        above, room = math.inf, 0.05 * max(point.y for point in points)
        for point in sorted(points, key=lambda p: -p.y):
            if point.marked and above - point.y >= room:
                above = point.y
                _name(chart.axes, point)
        chart.axes.set(xlabel=x_name, ylabel=y_name, xlim=(0, None), ylim=(0, None))
    return chart.svg


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """One line per name through its (x, y); values that are not finite break it."""
    with _chart(3.3) as chart:
        for colour, (name, points) in zip(COLOURS * len(series), series.items(), strict=False):
            alone = "." if len(points) == 1 else None
            chart.axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.2, marker=alone)
        ys = [y for points in series.values() for _, y in points if math.isfinite(y)]
        if ys and 0 <= min(ys) < 0.25 * max(ys):  # zero is not far
            chart.axes.set_ylim(bottom=0)
        chart.axes.locator_params(axis="x", integer=True)
        chart.axes.grid(alpha=0.3)
        chart.axes.set(xlabel=x_name, ylabel=y_name)
    return chart.svg


def _name(axes: Axes, point: Point) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    axes.annotate(
        point.label, (point.x, point.y), (6, 2), textcoords="offset points", fontsize="small", bbox=box
    )


@dataclass
class _Chart:
    axes: Axes
    svg: str = ""


@contextmanager
def _chart(height: float) -> Iterator[_Chart]:
    """Axes to draw on; their SVG when drawn. Without a display and pyplot's global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own matplotlibrc may ask for LaTeX, or white on black
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        chart = _Chart(figure.subplots())
        yield chart
        handles, names = chart.axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside upper left", ncols=6)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    chart.svg = written.getvalue()[written.getvalue().index("<svg") :]

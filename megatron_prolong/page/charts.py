"""Three charts as SVG text: stacked bars, points and lines. Axes start where the data says; labels are text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron_prolong.page.amount import amount

# Okabe and Ito's colours, told apart by readers with any colour vision, and three more; grey last.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A200", "#7B4FA3", "#A65628", "#8A93A0",
)  # fmt: skip
WIDTH = 900


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart; `label` is shown when hovering, `marked` ones are filled and named."""

    x: float
    y: float
    label: str
    marked: bool = False


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, limit: float | None = None
) -> str:
    """One horizontal bar per row, cut into its named parts; a dashed line at `limit`."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    longest = max([sum(parts.values()) for _, parts in rows] + ([limit] if limit else []))
    legend, legend_height = _legend(names)
    left, bar, top = 330, 26, legend_height + 14
    height = top + bar * len(rows) + 30
    scale = (WIDTH - left - 90) / longest
    parts_svg = [legend]
    for index, (label, parts) in enumerate(rows):
        y, x = top + bar * index, float(left)
        parts_svg.append(_text(left - 8, y + 15, label, anchor="end"))
        for name, value in parts.items():
            tip = f"{label}: {name} {amount(value, 2)} {unit}"
            parts_svg.append(_bar(x, y, value * scale, bar - 6, names.index(name), tip))
            x += value * scale
        parts_svg.append(_text(x + 6, y + 15, f"{amount(sum(parts.values()))} {unit}", soft=True))
    if limit:
        x = left + limit * scale
        parts_svg.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height - 24}" class="axis" '
            'style="stroke:#D55E00;stroke-dasharray:4 3"/>'
        )
        parts_svg.append(_text(x, height - 8, f"{amount(limit, 0)} {unit}", anchor="end", soft=True))
    return _svg(height, parts_svg)


def scatter(points: Sequence[Point], x_name: str, y_name: str) -> str:
    """Points with axes from zero."""
    height = 420
    frame = _Frame(0, _ceiling([p.x for p in points]), 0, _ceiling([p.y for p in points]), height)
    parts = [frame.axes(x_name, y_name)]
    for point in sorted(points, key=lambda p: p.marked):
        x, y = frame.at(point.x, point.y)
        colour = COLOURS[0] if point.marked else COLOURS[-1]
        radius, opacity = (5, 1) if point.marked else (3, 0.45)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="{opacity}">'
            f"<title>{escape(point.label)}</title></circle>"
        )
    return _svg(height, parts)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """One line per name through its (x, y); values that are not finite break it."""
    legend, legend_height = _legend(list(series))
    height = 300 + legend_height
    values = [
        (x, y) for points in series.values() for x, y in points if math.isfinite(x) and math.isfinite(y)
    ]
    if not values:
        return _svg(60, [_text(20, 36, "no values", soft=True)])
    xs, ys = [x for x, _ in values], [y for _, y in values]
    margin = (max(ys) - min(ys) or abs(max(ys)) or 1.0) * 0.06
    bottom = 0.0 if 0 <= min(ys) < 0.25 * max(ys) else min(ys) - margin
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    frame = _Frame(min(xs), right, bottom, max(ys) + margin, height, top=legend_height + 34)
    parts = [frame.axes(x_name, y_name), legend]
    for index, points in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        for run in _finite_runs(points):
            path = " ".join("{:.1f},{:.1f}".format(*frame.at(x, y)) for x, y in run)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    return _svg(height, parts)


@dataclass(frozen=True)
class _Frame:
    """Data coordinates to pixels."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int
    left: int = 80
    top: int = 34
    right: int = 24
    below: int = 46

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return (
            self.left + across * (WIDTH - self.left - self.right),
            self.height - self.below - up * (self.height - self.top - self.below),
        )

    def axes(self, x_name: str, y_name: str) -> str:
        """Grid, ticks and names."""
        parts = []
        for value in _ticks(self.y_low, self.y_high):
            x, y = self.at(self.x_low, value)
            parts.append(f'<line class="axis" x1="{x}" x2="{WIDTH - self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(_text(x - 8, y + 4, _short(value), anchor="end", soft=True))
        for value in _ticks(self.x_low, self.x_high):
            x, y = self.at(value, self.y_low)
            parts.append(_text(x, y + 18, _short(value), anchor="middle", soft=True))
        parts.append(_text(WIDTH - self.right, self.height - 6, x_name, anchor="end"))
        parts.append(_text(8, self.top - 14, y_name))
        return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values within [low, high]."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'K' else size):g}{letter}"
    return f"{value:g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.0e}"


def _ceiling(values: Sequence[float]) -> float:
    return max(values) * 1.05


def _finite_runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((x, y))
        else:
            runs.append([])
    return [run for run in runs if run]


def _legend(names: Sequence[str]) -> tuple[str, int]:
    """Colour keys in as many rows as they take, and the pixels that these are high."""
    parts, x, y = [], 8.0, 4.0
    for index, name in enumerate(names):
        width = 34 + 7 * len(name)
        if x + width > WIDTH:
            x, y = 8.0, y + 20
        parts.append(_bar(x, y, 12, 12, index, name))
        parts.append(_text(x + 17, y + 11, name))
        x += width
    return "".join(parts), int(y) + 16


def _bar(x: float, y: float, width: float, height: float, index: int, tip: str) -> str:
    colour = COLOURS[index % len(COLOURS)]
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}">'
        f"<title>{escape(tip)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", soft: bool = False) -> str:
    kind = ' class="soft"' if soft else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg role="img" {size}>{"".join(parts)}</svg>'

"""Results of an evaluation on disk and on the screen: tables and pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_prolong.evaluation.needle import NeedleCell
from megatron_prolong.evaluation.perplexity import Perplexity
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.runtime.publish import whole_file
from megatron_prolong.runtime.terminal import print_table


def print_perplexity(results: dict[str, Perplexity]) -> None:
    """Two tables, models by row: loss of the same last tokens by context, and loss by position.

    With a warning where the models' tokens are not the same.
    """
    any_result = next(iter(results.values()))
    contexts = Table(
        "model",
        *(format_count(at.context) for at in any_result.by_context),
        title=f"Loss of the same last {any_result.window} tokens, by context given (nats per token)",
    )
    positions = Table(
        "model",
        *(f"{bucket.start}–{bucket.end}" for bucket in any_result.by_position),
        title="Loss by position at the longest context (nats per token)",
    )
    for label, result in results.items():
        contexts.add_row(label, *(f"{at.loss:.3f}" for at in result.by_context))
        positions.add_row(label, *(f"{bucket.loss:.3f}" for bucket in result.by_position))
    print_table(contexts)
    print_table(positions)
    if len({result.tokens for result in results.values()}) > 1:
        named = ", ".join(f"{label}: {result.tokenizer}" for label, result in results.items())
        print(
            f"warning: the models' tokenizers differ ({named}), so their tokens are not the same text: compare a "
            "model's losses with its own at other lengths, not with another model's",
            file=sys.stderr,
        )


def plot_perplexity(results: dict[str, Perplexity], path: Path) -> None:
    """Loss by position and by context, one line per model."""
    figure, (left, right) = new_figure(2)
    for label, result in results.items():
        centres = [(bucket.start * bucket.end) ** 0.5 for bucket in result.by_position]
        left.plot(centres, [bucket.loss for bucket in result.by_position], marker="o", label=label)
        lengths = [at.context for at in result.by_context]
        right.plot(lengths, [at.loss for at in result.by_context], marker="o", label=label)
    left.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title="Held-out loss by position")
    right.set(
        xlabel="context given (tokens)", ylabel="loss (nats per token)", title="Loss of the same last tokens"
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def print_needle(results: dict[str, Sequence[NeedleCell]]) -> None:
    """One table per model: ranking and recall (percent) by depth and length."""
    for label, cells in results.items():
        lengths = sorted({cell.length for cell in cells})
        title = f"{label}: needle ranked first / generated (percent)"
        table = Table("depth", *map(format_count, lengths), title=title)
        for depth in sorted({cell.depth for cell in cells}):
            row = {cell.length: cell for cell in cells if cell.depth == depth}
            table.add_row(
                f"{100 * depth:.0f}%",
                *(
                    f"{100 * row[length].ranked_first:.0f} / {100 * row[length].recall:.0f}"
                    for length in lengths
                ),
            )
        print_table(table)


def plot_needle(results: dict[str, Sequence[NeedleCell]], path: Path) -> None:
    """Two heatmaps per model (ranking above, recall below), depth by length."""
    figure, axes = new_figure(len(results), rows=2)
    for column, (label, cells) in enumerate(results.items()):
        for row, score in enumerate(("ranked_first", "recall")):
            place, title = axes[row * len(results) + column], f"{label}: {score.replace('_', ' ')}"
            depths = {depth: f"{100 * depth:.0f}%" for depth in sorted({cell.depth for cell in cells})}
            heatmap(place, {(cell.depth, cell.length): 100 * getattr(cell, score) for cell in cells}, depths)
            place.set(xlabel="context (tokens)", ylabel="depth of the needle", title=title)
    save_figure(figure, path)


def heatmap(axes: Any, scores: Mapping[tuple[Any, int], float], rows: Mapping[Any, str]) -> None:
    """Scores from 0 to 100 by row and length; `rows` are their names, from the top down."""
    lengths = sorted({length for _, length in scores})
    grid = [[scores.get((row, length), math.nan) for length in lengths] for row in rows]
    axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [format_count(length) for length in lengths])
    axes.set_yticks(range(len(rows)), rows.values())
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)


def new_figure(columns: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure drawn without a display, and its axes row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

"""The picture of suite results, for one model or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_prolong.evaluation.averages import averages, of_suite
from megatron_prolong.evaluation.report import heatmap, new_figure, save_figure
from megatron_prolong.evaluation.results import Models


def plot_suite(models: Models, suite: str | None, path: Path) -> None:
    """Above, the average by length of every category of the suite's; below, a heatmap of all tasks per model."""
    averaged = of_suite(models, suite)
    categories = sorted({result.category for results in averaged.values() for result in results})
    columns = max(len(categories), len(models))
    figure, axes = new_figure(columns, rows=2)
    for place, category in enumerate(categories):
        _lines(axes[place], averaged, category)
    for place, (label, results) in enumerate(models.items()):
        scores = {((one.category, _short(one.name)), one.length): one.score for one in results}
        tasks = sorted({task for task, _ in scores})
        heatmap(axes[columns + place], scores, {task: task[1] for task in tasks})
        axes[columns + place].set(title=label, xlabel="length (tokens)")
    for unused in [*axes[len(categories) : columns], *axes[columns + len(models) :]]:
        unused.set_visible(False)
    save_figure(figure, path)


def _lines(axes: Any, models: Models, category: str) -> None:
    for label, results in models.items():
        line = [one for one in averages(results) if one.category == category]
        axes.plot([one.length for one in line], [one.score for one in line], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(title=category, xlabel="length (tokens)", ylabel="score", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend()


def _short(name: str) -> str:
    """The task's name without the number that changes with the length."""
    return "_".join(part for part in name.split("_") if not part.rstrip("shot").isdigit() or len(part) == 1)

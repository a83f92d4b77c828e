"""Tables and plots of suite results, for one model or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_prolong.evaluation.bootstrap import Interval, difference_interval
from megatron_prolong.evaluation.published import published
from megatron_prolong.evaluation.report import heatmap, new_figure, save_figure
from megatron_prolong.evaluation.results import (
    ANSWERED,
    ASKED,
    DEVELOPMENT,
    MEAN,
    Average,
    Key,
    Result,
    averages,
    development,
    key_of,
    missing_of_development,
)
from megatron_prolong.evaluation.suites import CATEGORIES, SUITES, is_of_prolong
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.runtime.terminal import print_table

Models = Mapping[str, Sequence[Result]]
"""Results by the model's label, in the order of the table."""


@dataclass(frozen=True)
class Change:
    """A task's difference from the first model, 0 to 100, paired by row; None where rows or scores differ."""

    model: str
    category: str
    task: str
    length: int
    interval: Interval | None


def changes(models: Models) -> list[Change]:
    """Every other model against the first, task by task, paired by row."""
    return [
        Change(label, one.category, one.name, one.length, _difference(before, one))
        for label, before, one in _pairs(models)
    ]


def _pairs(models: Models) -> list[tuple[str, Result, Result]]:
    """Every other model's label and result, the first model's in the middle, of tasks that both have."""
    (_, baseline), *others = models.items()
    known = {result.key: result for result in baseline}
    return [(label, known[one.key], one) for label, results in others for one in results if one.key in known]


def _difference(before: Result, after: Result) -> Interval | None:
    if (before.asked, before.missing) != (after.asked, after.missing):  # judged beside not judged
        return None
    found = difference_interval(before.values, after.values, before.questions)
    return found and Interval(100 * found.mean, 100 * found.low, 100 * found.high)


@dataclass(frozen=True)
class Grid:
    """A table for the terminal and for the page."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def grids(models: Models, suite: str | None) -> list[Grid]:
    """Averages by category and length with published scores, then every task with its interval and change."""
    counted = _of_suite(models, suite)
    found = [_averages({label: averages(results) for label, results in counted.items()}, suite)]
    if suite == "prolong":
        found.append(_averages({label: development(results) for label, results in models.items()}, suite))
    return [*(grid for grid in found if grid.rows), _tasks(models)]


def _of_suite(models: Models, suite: str | None) -> Models:
    """ProLong's published scores are of a part of HELMET's tasks; so must be what stands beside them."""
    if suite != "prolong":
        return models
    return {label: [one for one in results if is_of_prolong(one.name)] for label, results in models.items()}


def notes(models: Models, suite: str | None) -> list[str]:
    """What a reader of the tables has to know, per model."""
    found = []
    for label, results in models.items():
        lines = (_cut(results), _generated(results), _missing(results) if suite == "prolong" else "")
        found += [f"{label}: {line}" for line in lines if line]
    return [*found, *_unlike(models)]


def _cut(results: Sequence[Result]) -> str:
    """How many contexts were cut to fit, per task."""
    cut = [f"{one.name} {one.truncated}/{len(one.values)}" for one in results if one.truncated]
    return f"contexts cut to fit: {', '.join(cut)}" if cut else ""


def _generated(results: Sequence[Result]) -> str:
    """Which tasks' data were made here, and are not what the published scores are of."""
    made = dict.fromkeys(one.name for one in results if one.generated)
    return f"on generated data: {', '.join(made)}" if made else ""


def _missing(results: Sequence[Result]) -> str:
    """Why there is no mean over DEVELOPMENT, where the rest of its table is."""
    missing = missing_of_development(results) if development(results) else []
    tasks = [f"{name} ({format_count(length)})" for length, _, name in missing]
    return f"no mean over 32K+64K for want of {', '.join(tasks)}" if tasks else ""


def _unlike(models: Models) -> list[str]:
    """In which settings a run differs from the first model's, and for which tasks."""
    tasks: dict[str, dict[str, None]] = {}
    for label, before, after in _pairs(models):
        unlike = [name for name in (*ASKED, *ANSWERED) if before.settings[name] != after.settings[name]]
        if unlike:
            said = ", ".join(
                f"{name} {after.settings[name]} (not {before.settings[name]})" for name in unlike
            )
            change = ", so no change is given" if {*unlike}.intersection(ASKED) else ""
            line = f"{label} against {next(iter(models))}: {said}{change}"
            tasks.setdefault(line, {})[after.name] = None
    return [f"{line}: {', '.join(names)}" for line, names in tasks.items()]


def print_suite(models: Models, suite: str | None) -> None:
    """The tables and notes on the terminal."""
    for grid in grids(models, suite):
        table = Table(title=grid.title)
        for heading in grid.headings:
            table.add_column(heading)
        for row in grid.rows:
            table.add_row(*row)
        print_table(table)
    for line in notes(models, suite):
        print(line)


def _averages(models: Mapping[str, Sequence[Average]], suite: str | None) -> Grid:
    by_model = {
        label: {(one.length, one.category): one for one in found if _of_all_categories(one, models)}
        for label, found in models.items()
    }
    keys = sorted({key for found in by_model.values() for key in found}, key=_mean_last)
    references = _references(suite, keys)
    wanted = _wanted(models, suite)
    rows = []
    for length, category in keys:
        own = [_cell(found.get((length, category)), wanted) for found in by_model.values()]
        theirs = [reference.get((length, category)) for reference in references.values()]
        shown = ["" if score is None else f"{score:.1f}" for score in theirs]
        lengths = [length] if length else DEVELOPMENT
        rows.append(["+".join(map(format_count, lengths)), category, *own, *shown])
    title = (
        "Averages (0–100; * partly without a judge or inference model; "
        "† without some task that the suite or another model has)"
    )
    return Grid(title, ["length", "category", *by_model, *references], rows)


def _of_all_categories(average: Average, models: Mapping[str, Sequence[Average]]) -> bool:
    """False of a mean over fewer categories than are shown at its length: it would compare other things."""
    everyone = [one for found in models.values() for one in found if one.length == average.length]
    shown = {one.category for one in everyone if one.category in CATEGORIES}
    return average.category != MEAN or shown <= {category for _, category, _ in average.tasks}


def _wanted(models: Mapping[str, Sequence[Average]], suite: str | None) -> set[Key]:
    """Every task that a model has, or the suite at these lengths."""
    found = {key for averaged in models.values() for one in averaged for key in one.tasks}
    build = SUITES.get(suite or "", lambda length: [])
    return found.union(key_of(task) for length in {key[0] for key in found} for task in build(length))


def _cell(average: Average | None, wanted: set[Key]) -> str:
    if average is None:
        return ""
    groups = {key[:2] for key in average.tasks}
    lacks = any(key[:2] in groups for key in wanted.difference(average.tasks))
    return f"{average.score:.1f}{'*' if average.partial else ''}{'†' if lacks else ''}"


def _mean_last(key: tuple[int, str]) -> tuple[int, bool, str]:
    length, category = key
    return length, category == MEAN, category


def _references(
    suite: str | None, keys: Sequence[tuple[int, str]]
) -> dict[str, dict[tuple[int, str], float]]:
    """Published scores by model and key; their mean only over just the categories shown."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for length in dict.fromkeys(length for length, _ in keys):
        shown = [category for at, category in keys if at == length and category in CATEGORIES]
        for model, scores in published(suite or "", length).items():
            cells = found.setdefault(f"{model} (published)", {})
            cells.update({(length, category): score for category, score in scores.items()})
            if shown and all(category in scores for category in shown):
                cells[length, MEAN] = sum(scores[category] for category in shown) / len(shown)
    return found


def _tasks(models: Models) -> Grid:
    change = (
        {(one.model, (one.length, one.category, one.task)): one.interval for one in changes(models)}
        if len(models) > 1
        else {}
    )
    cells = {
        (label, result.key): _task_cell(result, change.get((label, result.key)))
        for label, results in models.items()
        for result in results
    }
    sizes = {result.key: len(result.values) for results in models.values() for result in results}
    rows = [
        [format_count(key[0]), *key[1:], str(size), *(cells.get((label, key), "") for label in models)]
        for key, size in sorted(sizes.items())
    ]
    title = "Tasks: score [95% interval over questions], and change from the first model"
    return Grid(title, ["length", "category", "task", "n", *models], rows)


def _task_cell(result: Result, change: Interval | None) -> str:
    interval = result.interval
    several = len(result.scores) + len(result.missing) > 1  # and the category counts all of them
    text = f"{result.metric} " if several else ""
    text += f"{interval.mean:.1f} [{interval.low:.0f}, {interval.high:.0f}]"
    if change is not None:
        text += f" {change.mean:+.1f} [{change.low:+.0f}, {change.high:+.0f}]"
    return text


def summary(models: Models) -> dict[str, Any]:
    """Everything the tables show, as JSON values."""
    return {
        "averages": {label: averages(results) for label, results in models.items()},
        "development": {label: development(results) for label, results in models.items()},
        "tasks": {
            label: [
                {
                    "task": result.name,
                    "category": result.category,
                    "length": result.length,
                    "scores": result.scores,
                    "missing": result.missing,
                    "metric": result.metric,
                    "interval": result.interval,
                    "rows": len(result.values),
                    "questions": len(set(result.questions)),
                    "truncated": result.truncated,
                    **result.settings,
                }
                for result in results
            ]
            for label, results in models.items()
        },
        "changes": changes(models) if len(models) > 1 else [],
    }


def plot_suite(models: Models, path: Path) -> None:
    """Above, every category's average by length, one line per model; below, a heatmap of tasks per model."""
    categories = sorted({result.category for results in models.values() for result in results})
    columns = max(len(categories), len(models))
    figure, axes = new_figure(columns, rows=2)
    for place, category in enumerate(categories):
        _lines(axes[place], models, category)
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

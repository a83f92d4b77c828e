"""Tables of suite results, for one model or several side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from megatron_prolong.evaluation.averages import (
    DEVELOPMENT,
    MEAN,
    Average,
    averages,
    development,
    missing_of_development,
    of_suite,
)
from megatron_prolong.evaluation.bootstrap import Interval
from megatron_prolong.evaluation.changes import changes, unlike
from megatron_prolong.evaluation.published import published
from megatron_prolong.evaluation.results import Key, Models, Result, key_of, mean
from megatron_prolong.evaluation.suites import CATEGORIES, SUITES
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.runtime.terminal import print_table


@dataclass(frozen=True)
class Grid:
    """A table for the terminal and for the page."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def grids(models: Models, suite: str | None) -> list[Grid]:
    """Averages by category and length with published scores, then every task with its interval and change."""
    counted = of_suite(models, suite)
    found = [_averages({label: averages(results) for label, results in counted.items()}, suite)]
    if suite == "prolong":
        found.append(_averages({label: development(results) for label, results in models.items()}, suite))
    return [*(grid for grid in found if grid.rows), _tasks(models)]


def notes(models: Models, suite: str | None) -> list[str]:
    """What a reader of the tables has to know, per model."""
    found = []
    for label, results in models.items():
        missing = _missing(results) if suite == "prolong" else ""
        lines = (_other_weights(results), _cut(results), _unread(results), _generated(results), missing)
        found += [f"{label}: {line}" for line in lines if line]
    return [*found, *unlike(models)]


def _other_weights(results: Sequence[Result]) -> str:
    """Which results are not of the model of most: after a training that went on only some tasks were run again."""
    by_model: dict[str, list[str]] = {}
    for one in results:
        task = f"{one.name} ({format_count(one.length)})"
        by_model.setdefault(one.identity or one.model, []).append(task)
    names = [name for found in sorted(by_model.values(), key=len)[:-1] for name in found]
    return (
        f"of other weights than the rest, so its averages are of no one model: {', '.join(names)}"
        if names
        else ""
    )


def _cut(results: Sequence[Result]) -> str:
    """How many contexts were cut to fit, per task."""
    cut = [f"{one.name} {one.truncated}/{len(one.values)}" for one in results if one.truncated]
    return f"contexts cut to fit: {', '.join(cut)}" if cut else ""


def _unread(results: Sequence[Result]) -> str:
    """How many rows have no score, since the judge's answer could not be read, per task."""
    counts = [(one, sum(map(math.isnan, one.values))) for one in results]
    unread = [f"{one.name} {count}/{len(one.values)}" for one, count in counts if count]
    return f"left out, since the judge's answer could not be read: {', '.join(unread)}" if unread else ""


def _generated(results: Sequence[Result]) -> str:
    """Which tasks' data were made here, and are not what the published scores are of."""
    made = dict.fromkeys(one.name for one in results if one.settings["generated"])
    return f"on generated data: {', '.join(made)}" if made else ""


def _missing(results: Sequence[Result]) -> str:
    """Why there is no mean over DEVELOPMENT, where the rest of its table is."""
    missing = missing_of_development(results) if development(results) else []
    tasks = [f"{name} ({format_count(length)})" for length, _, name in missing]
    return f"no mean over 32K+64K for want of {', '.join(tasks)}" if tasks else ""


def print_suite(models: Models, suite: str | None) -> None:
    """The tables and notes on the terminal."""
    for grid in grids(models, suite):
        table = Table(*grid.headings, title=grid.title)
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
    """False for a mean over fewer categories than are shown at its length: it would compare other things."""
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
                cells[length, MEAN] = mean([scores[category] for category in shown])
    return found


def _tasks(models: Models) -> Grid:
    change = {(one.model, (one.length, one.category, one.task)): one.interval for one in changes(models)}
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
    text += f"{interval.mean:.1f} {_ends(interval, '.0f')}"
    if change is not None:
        text += f" {change.mean:+.1f} {_ends(change, '+.0f')}"
    return text


def _ends(interval: Interval, form: str) -> str:
    return (
        "[one question]" if math.isnan(interval.low) else f"[{interval.low:{form}}, {interval.high:{form}}]"
    )


def summary(models: Models, suite: str | None) -> dict[str, Any]:
    """Everything the tables show, as JSON values; of all tasks only those of the suite are averaged."""
    return {
        "averages": {label: averages(results) for label, results in of_suite(models, suite).items()},
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
        "changes": changes(models),
    }

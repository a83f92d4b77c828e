"""What changed from the first model to the others, question by question, and where two runs do not compare."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prolong.evaluation.bootstrap import Interval, difference_interval
from megatron_prolong.evaluation.results import ASKED, Models, Result


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


def _comparable(before: Result, after: Result) -> bool:
    # Both judged, by the same, or neither.
    judges = {(one.missing, one.settings["judge"]) for one in (before, after)}
    return len(judges) == 1 and before.asks_as(after)


def _difference(before: Result, after: Result) -> Interval | None:
    if not _comparable(before, after):
        return None
    found = difference_interval(before.values, after.values, before.questions)
    return found and Interval(100 * found.mean, 100 * found.low, 100 * found.high)


def unlike(models: Models) -> list[str]:
    """In what a run differs from the first model's, and for which tasks."""
    tasks: dict[str, dict[str, None]] = {}
    for label, before, after in _pairs(models):
        settings = [name for name in before.settings if before.settings[name] != after.settings[name]]
        said = [f"{name} {after.settings[name]} (not {before.settings[name]})" for name in settings]
        if not before.asks_as(after) and not {*settings}.intersection(ASKED):
            said.append("other prompts")
        if said:
            change = "" if _comparable(before, after) else ", so no change is given"
            line = f"{label} against {next(iter(models))}: {', '.join(said)}{change}"
            tasks.setdefault(line, {})[after.name] = None
    return [f"{line}: {', '.join(names)}" for line, names in tasks.items()]

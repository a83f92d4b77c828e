"""What results come to: averages by category and length, HELMET's overall score, and ProLong's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_prolong.evaluation.results import Key, Models, Result, key_of, mean
from megatron_prolong.evaluation.suites import CATEGORIES, is_of_prolong, prolong

MEAN = "mean"
# Over which lengths nearly every table of ProLong's ablations averages.
DEVELOPMENT = (32 << 10, 64 << 10)


@dataclass(frozen=True)
class Average:
    """A category at one length, or MEAN of HELMET's. partial: some of its scores are missing or stand-ins.

    length: 0 for those over DEVELOPMENT.
    """

    category: str
    length: int
    score: float
    partial: bool
    tasks: tuple[Key, ...]


def averages(results: Iterable[Result]) -> list[Average]:
    """Mean of every category's scores at every length (metrics weigh equally, as in HELMET's Cite), then of these.

    The last is HELMET's and ProLong's overall score: every category weighs the same, and RULER is none of them.
    """
    groups: dict[int, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.length, {}).setdefault(result.category, []).append(result)
    found = []
    for length, categories in sorted(groups.items()):
        own = [_average(category, length, members) for category, members in sorted(categories.items())]
        found += own
        counted = [one for one in own if one.category in CATEGORIES]
        if len(counted) > 1:
            score = mean([one.score for one in counted])
            found.append(Average(MEAN, length, score, any(one.partial for one in counted), _tasks(counted)))
    return found


def development(results: Iterable[Result]) -> list[Average]:
    """What ProLong was developed by (paper, §2.2): the averages of its subset of HELMET over 32K and 64K together.

    Of every category that both lengths have, and the MEAN of all six if nothing is missing.
    """
    counted = [result for result in results if is_of_prolong(result.name)]
    found = averages(counted)
    short, long = ({one.category: one for one in found if one.length == length} for length in DEVELOPMENT)
    shared = [category for category in short if category in long]
    if missing_of_development(counted):
        shared = [category for category in shared if category != MEAN]
    return [_over_lengths([short[category], long[category]]) for category in shared]


def missing_of_development(results: Iterable[Result]) -> list[Key]:
    """The tasks without which there is no MEAN over DEVELOPMENT."""
    there = {result.key for result in results}
    wanted = [key_of(task) for length in DEVELOPMENT for task in prolong(length)]
    return [key for key in wanted if key not in there]


def _over_lengths(members: Sequence[Average]) -> Average:
    score = mean([one.score for one in members])
    return Average(members[0].category, 0, score, any(one.partial for one in members), _tasks(members))


def _tasks(members: Iterable[Average]) -> tuple[Key, ...]:
    return tuple(key for one in members for key in one.tasks)


def _average(category: str, length: int, members: Sequence[Result]) -> Average:
    score = mean([score for result in members for score in result.counted])
    tasks = tuple(result.key for result in members)
    return Average(category, length, score, any(result.missing for result in members), tasks)


def of_suite(models: Models, suite: str | None) -> Models:
    """ProLong's published scores are of a part of HELMET's tasks; so must be what stands beside them."""
    if suite != "prolong":
        return models
    return {label: [one for one in results if is_of_prolong(one.name)] for label, results in models.items()}

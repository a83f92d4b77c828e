"""Finished results, read back from HELMET-style files: what tables, plots and comparisons are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.bootstrap import Interval, mean_interval
from megatron_prolong.evaluation.suites import CATEGORIES, is_of_prolong, prolong
from megatron_prolong.evaluation.task import Task
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.recipe.shape import read_json

JUDGED = "-gpt4eval_o.json"
# `args` are the first field of what we write, and some forty lines; all the rest may be hundreds of megabytes.
_FRONT_CHARACTERS = 1 << 16
_ARGUMENTS = re.compile(r'\{\s*"args":\s*')
# How HELMET puts scores on a 0 to 100 scale; averaged_metrics holds the others so already.
SCALE = {"gpt-4-score": 100 / 3, "gpt-4-f1": 100}
# Shown in place of a judge's score while there is none.
WITHOUT_JUDGE = "rougeL_f1"
MEAN = "mean"
# Over which lengths nearly every table of ProLong's ablations averages.
DEVELOPMENT = (32 << 10, 64 << 10)
# Settings of a run, by their names in `args`: what makes its questions, and how they were answered.
ASKED = ("seed", "generated", "haystack", "documents_cut_by")
ANSWERED = ("use_chat_template", "stop_newline", "too_long")
Key = tuple[int, str, str]
"""Length, category and name: one model has one result of each. Categories may share a task of RULER's."""


@dataclass(frozen=True)
class Result:
    """One task of one model at one length.

    Attributes:
        scores: the task's metrics that are known, 0 to 100.
        missing: those that are not (no judge, no inference model).
        stand_in: ROUGE-L F1, 0 to 100, while a judge's score is missing.
        values: per row, 0 to 1, of the first metric or its stand-in, for intervals; NaN where the judge's answer
            could not be read.
        questions: which question each row asks.
        truncated: rows whose context was cut.
        settings: ASKED and ANSWERED.
    """

    path: Path
    name: str
    category: str
    length: int
    model: str
    generated: bool
    scores: dict[str, float]
    missing: tuple[str, ...]
    stand_in: float | None
    values: tuple[float, ...]
    questions: tuple[Hashable, ...]
    truncated: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> Key:
        """Which task at which length."""
        return self.length, self.category, self.name

    @property
    def asked(self) -> tuple[object, ...]:
        """The questions and how they were made: RULER's are known by the row alone, whatever the seed."""
        return self.questions, *(self.settings[name] for name in ASKED)

    @property
    def counted(self) -> list[float]:
        """What enters the averages: the metrics that are known, and the stand-in of a judge's."""
        stand_in = [self.stand_in] if self.missing and self.stand_in is not None else []
        return [*self.scores.values(), *stand_in]

    @property
    def score(self) -> float:
        """The task's score: the mean of what is counted, 0 to 100; NaN without any."""
        return _mean(self.counted)

    @property
    def metric(self) -> str:
        """The first, or its stand-in: what `values` are."""
        return next(iter(self.scores), WITHOUT_JUDGE)

    @property
    def interval(self) -> Interval:
        """This metric with its 95% interval, 0 to 100."""
        found = mean_interval(self.values, self.questions)
        return Interval(100 * found.mean, 100 * found.low, 100 * found.high)


def key_of(task: Task) -> Key:
    """The key its result will have."""
    return task.length, task.category, task.name


def judged_path(path: Path) -> Path:
    """Where HELMET's scripts put the judged form of a result."""
    return path.with_name(path.name.removesuffix(".json") + JUDGED)


def read_arguments(path: Path) -> Any:
    """The `args` of a result, without reading the rest where they stand at its front; None of another JSON file."""
    with path.open(encoding="utf-8") as file:
        front = file.read(_FRONT_CHARACTERS)
    if begin := _ARGUMENTS.match(front):
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(front, begin.end())[0]
    return read_json(path).get("args")


def read_result(path: Path) -> Result:
    """Read one result; the judge's file beside it (…-gpt4eval_o.json) wins.

    Raises:
        UserError: the file is damaged, or lacks a field.
    """
    judged = judged_path(path)
    written = judged if judged.exists() else path
    with whole_result(written):
        return _result(path, read_json(written))


@contextmanager
def whole_result(path: Path) -> Iterator[None]:
    """Around reading a result's fields: one that is missing or of another kind is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole result of `prolong eval run` ({type(error).__name__}: {error}); "
            "delete it, and run the task again"
        ) from error


def _result(path: Path, content: dict[str, Any]) -> Result:
    arguments, items = content["args"], content["data"]
    averages = content["averaged_metrics"]
    names = arguments["metric_names"]
    known = {name: averages[name] * SCALE.get(name, 1) for name in names if name in averages}
    return Result(
        path=path,
        name=arguments["datasets"],
        category=arguments["category"],
        length=arguments["input_max_length"],
        model=arguments["model_name_or_path"],
        generated=arguments["generated"],
        scores=known,
        missing=tuple(name for name in names if name not in known),
        stand_in=averages.get(WITHOUT_JUDGE) if any(name.startswith("gpt-4") for name in names) else None,
        values=tuple(_row_value(item, names[0] if names[0] in averages else WITHOUT_JUDGE) for item in items),
        questions=tuple(_question(item, arguments["question_field"], row) for row, item in enumerate(items)),
        truncated=sum(item["removed_tokens"] > 0 for item in items),
        settings={name: arguments.get(name) for name in (*ASKED, *ANSWERED)},
    )


def read_results(directory: Path) -> list[Result]:
    """Every result in a model's directory.

    Raises:
        UserError: there is none, or there are several of the same task at the same length.
    """
    results = [read_result(path) for path in _result_paths(directory)]
    if not results:
        below = [str(each) for each in sorted(directory.glob("*/")) if _result_paths(each)]
        where = f"give {' or '.join(below)}" if below else "`prolong eval run MODEL --suite …` makes some"
        raise UserError(f"{directory}: no results of a model here; {where}")
    _refuse_several(directory, results)
    return results


def _result_paths(directory: Path) -> list[Path]:
    paths = [path for path in sorted(directory.glob("*.json")) if not path.name.endswith(JUDGED)]
    return [path for path in paths if _is_result(path)]


def _refuse_several(directory: Path, results: Iterable[Result]) -> None:
    files: dict[Key, list[str]] = {}
    for result in results:
        files.setdefault(result.key, []).append(result.path.name)
    if several := {key: names for key, names in files.items() if len(names) > 1}:
        raise UserError.many(
            f"{directory}: several results of one task, made with other settings (--samples, --chat, --seed, "
            "--tag); delete all but one, or move them to a folder of their own:",
            (
                "\n    ".join([f"{name} at {format_count(length)}:", *found])
                for (length, _, name), found in several.items()
            ),
        )


def _is_result(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        head = file.read(1)
    return head == "{" and "_in" in path.name and "_shots" in path.name


def _row_value(item: dict[str, Any], metric: str) -> float:
    """The row's own score of a metric, 0 to 1."""
    if metric in SCALE:
        judged = item.get("gpt-4-scores")
        if not judged:
            return float("nan")
        if metric == "gpt-4-f1":
            return float(judged["f1"])
        return float(judged["fluency"]) * float(judged["correctness"]) / 3
    if metric in ("str_em", "qampari_rec_top5"):
        from megatron_prolong.evaluation.alce import qampari_scores, str_em

        return str_em(item) if metric == "str_em" else qampari_scores(item)[metric]
    return float(item[metric])


def _question(item: dict[str, Any], field: str, row: int) -> Hashable:
    value = item.get(field)
    return value if isinstance(value, Hashable) and value not in (None, "") else row


@dataclass(frozen=True)
class Average:
    """A category at one length, or MEAN of HELMET's. partial: some of its scores are missing or stand-ins.

    length: 0 of those over DEVELOPMENT.
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
            score = sum(one.score for one in counted) / len(counted)
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
    score = _mean([one.score for one in members])
    return Average(members[0].category, 0, score, any(one.partial for one in members), _tasks(members))


def _tasks(members: Iterable[Average]) -> tuple[Key, ...]:
    return tuple(key for one in members for key in one.tasks)


def _average(category: str, length: int, members: Sequence[Result]) -> Average:
    mean = _mean([score for result in members for score in result.counted])
    tasks = tuple(result.key for result in members)
    return Average(category, length, mean, any(result.missing for result in members), tasks)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else float("nan")

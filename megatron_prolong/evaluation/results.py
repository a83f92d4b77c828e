"""Finished results, read back from HELMET-style files: what tables, plots and comparisons are made of."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.bootstrap import Interval, mean_interval
from megatron_prolong.evaluation.task import Task
from megatron_prolong.recipe.numbers import format_count
from megatron_prolong.recipe.shape import read_json

JUDGED = "-gpt4eval_o.json"
SHORT_SCORES, HARNESS_SCORES = "short*.json", "lm_eval*.json"
"""Other files of scores in a model's directory: the short suite's, and those of lm-evaluation-harness's tasks."""
# `args` are the first field of what we write, and some forty lines; all the rest may be hundreds of megabytes.
_FRONT_CHARACTERS = 1 << 16
_ARGUMENTS = re.compile(r'\{\s*"args":\s*')
# How HELMET puts scores on a 0 to 100 scale; averaged_metrics holds the others so already.
SCALE = {"gpt-4-score": 100 / 3, "gpt-4-f1": 100}
# Shown in place of a judge's score while there is none.
WITHOUT_JUDGE = "rougeL_f1"
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
        settings: ASKED, ANSWERED and the judge's model.
        identity: of the model's weights; empty for a served one.
        prompts: a digest of all of them, without a chat template; empty in results of versions that kept none.
    """

    path: Path
    name: str
    category: str
    length: int
    model: str
    scores: dict[str, float]
    missing: tuple[str, ...]
    stand_in: float | None
    values: tuple[float, ...]
    questions: tuple[Hashable, ...]
    truncated: int
    settings: Mapping[str, Any]
    identity: str = ""
    prompts: str = ""

    @property
    def key(self) -> Key:
        """Which task at which length."""
        return self.length, self.category, self.name

    def asks_as(self, other: Result) -> bool:
        """Whether both asked the same: generated tasks, for one, are sized with each model's own tokenizer."""
        if self.prompts and other.prompts:
            return self.prompts == other.prompts
        mine, others = ((one.questions, *(one.settings[name] for name in ASKED)) for one in (self, other))
        return mine == others

    @property
    def counted(self) -> list[float]:
        """What enters the averages: the metrics that are known, and the stand-in of a judge's."""
        stand_in = [self.stand_in] if self.missing and self.stand_in is not None else []
        return [*self.scores.values(), *stand_in]

    @property
    def score(self) -> float:
        """The task's score: the mean of what is counted, 0 to 100; NaN without any."""
        return mean(self.counted)

    @property
    def metric(self) -> str:
        """The first, or its stand-in: what `values` are."""
        return next(iter(self.scores), WITHOUT_JUDGE)

    @property
    def interval(self) -> Interval:
        """This metric with its 95% interval, 0 to 100."""
        found = mean_interval(self.values, self.questions)
        return Interval(100 * found.mean, 100 * found.low, 100 * found.high)


Models = Mapping[str, Sequence[Result]]
"""Results by the model's label, in the order of the table."""


def mean(scores: Sequence[float]) -> float:
    """Their mean; NaN for none."""
    return sum(scores) / len(scores) if scores else float("nan")


def key_of(task: Task) -> Key:
    """The key its result will have."""
    return task.length, task.category, task.name


def judged_path(path: Path) -> Path:
    """Where HELMET's scripts put the judged form of a result."""
    return path.with_name(path.name.removesuffix(".json") + JUDGED)


def read_arguments(path: Path) -> Any:
    """The `args` of a result, without reading the rest where they stand at its front; None for other JSON files."""
    with path.open(encoding="utf-8", errors="replace") as file:  # `read_whole` says what is no text
        front = file.read(_FRONT_CHARACTERS)
    if begin := _ARGUMENTS.match(front):
        with suppress(ValueError):
            return json.JSONDecoder().raw_decode(front, begin.end())[0]
    return read_whole(path).get("args")


def read_whole(path: Path) -> dict[str, Any]:
    """All of a result. Raises UserError, with the remedy, when it was copied by half, say."""
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    again = "judge its answers (`prolong eval judge`)" if path.name.endswith(JUDGED) else "run the task"
    return f"delete it, and {again} again"


def read_result(path: Path) -> Result:
    """Read one result; the judge's file beside it (…-gpt4eval_o.json) wins.

    Raises:
        UserError: the file is damaged, or lacks a field.
    """
    judged = judged_path(path)
    written = judged if judged.exists() else path
    with whole_result(written):
        return _result(path, read_whole(written))


@contextmanager
def whole_result(path: Path) -> Iterator[None]:
    """Around reading a result's fields: one that is missing or of another kind is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole result of `prolong eval` ({type(error).__name__}: {error}); {_remedy(path)}"
        ) from error


def _result(path: Path, content: dict[str, Any]) -> Result:
    arguments, items = content["args"], content["data"]
    if not items:
        raise ValueError("there are no answers")
    averages = content["averaged_metrics"]
    names = arguments["metric_names"]
    known = {name: float(averages[name]) * SCALE.get(name, 1) for name in names if name in averages}
    stand_in = averages.get(WITHOUT_JUDGE) if any(name.startswith("gpt-4") for name in names) else None
    values = tuple(_row_value(item, names[0] if names[0] in averages else WITHOUT_JUDGE) for item in items)
    if all(map(math.isnan, values)):
        raise ValueError("none of the judge's answers can be read")
    return Result(
        path=path,
        name=arguments["datasets"],
        category=arguments["category"],
        length=int(arguments["input_max_length"]),
        model=arguments["model_name_or_path"],
        scores=known,
        missing=tuple(name for name in names if name not in known),
        stand_in=None if stand_in is None else float(stand_in),
        values=values,
        questions=tuple(_question(item, arguments["question_field"], row) for row, item in enumerate(items)),
        truncated=sum(item["removed_tokens"] > 0 for item in items),
        settings={
            **{name: arguments.get(name) for name in (*ASKED, *ANSWERED)},
            "judge": content.get("judge", {}).get("model"),
        },
        identity=arguments.get("model_identity", ""),
        prompts=content.get("prompts", ""),
    )


def read_results(directory: Path) -> list[Result]:
    """Every result in a model's directory.

    Raises:
        UserError: there is none, or there are several of the same task at the same length.
    """
    results = [read_result(path) for path in result_paths(directory)]
    _refuse_several(directory, results)
    return results


def result_paths(directory: Path) -> list[Path]:
    """The files of every result in a model's directory, without the judged forms.

    Raises:
        UserError: there is none.
    """
    if paths := _result_paths(directory):
        return paths
    if other := sorted([*directory.glob(SHORT_SCORES), *directory.glob(HARNESS_SCORES)]):
        raise UserError(
            f"{directory}: holds {other[0].name} but no results of a suite, which alone are read here; give the "
            "command that made it again, with the other models under --compare: it asks no finished task again"
        )
    below = [str(each) for each in sorted(directory.glob("*/")) if _result_paths(each)]
    where = f"give {' or '.join(below)}" if below else "`prolong eval run MODEL --suite …` makes some"
    raise UserError(f"{directory}: no results of a model here; {where}")


def _result_paths(directory: Path) -> list[Path]:
    paths = [path for path in sorted(directory.glob("*.json")) if not path.name.endswith(JUDGED)]
    return [path for path in paths if "_in" in path.name and "_shots" in path.name]


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

"""A task: data + template + score. One file per category in `tasks/` builds them.

Field names in rows and templates are HELMET's, so that its data files are read as they are and its own
programs read our results.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.text_metrics import parse_output, text_metrics

Row = dict[str, Any]
"""One example: the fields of the data file and those of the task's template, `answer` among them."""


@dataclass(frozen=True)
class Scored:
    """Scores of one output, 0 to 1 by name, and what was read out of it (`parsed_output` in the results)."""

    scores: Mapping[str, float]
    parsed: Any


Score = Callable[[str, Row], Scored]
Summarise = Callable[[Sequence[Row], "Entails | None"], dict[str, float]]
Entails = Callable[[str, str], bool]
"""Does the passage entail the claim? (a natural-language-inference model)"""


@dataclass(frozen=True)
class Inputs:
    """What loading a task needs.

    Attributes:
        data: HELMET's unpacked data directory (the one with json_kv/, ruler/, kilt/ …), if there is one.
        tokenizer: the model's; generated tasks are sized with it.
        seed: HELMET's is 42; chooses examples, demonstrations and generated content.
        max_samples: questions per task; None means HELMET's number.
        haystack: text for generated needle tasks that want prose; empty means RULER's noise sentences.
    """

    data: Path | None
    tokenizer: Any
    seed: int = 42
    max_samples: int | None = None
    haystack: str = ""


def score_text(output: str, row: Row, prefix: str = "Answer:") -> Scored:
    """HELMET's default: every text score on the output and on its parsed answer, the better of the two."""
    parsed = parse_output(output, prefix)
    raw, cut = text_metrics(output, row["answer"]), text_metrics(parsed, row["answer"])
    return Scored({name: max(value, cut[name]) for name, value in raw.items()}, parsed)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set at one length.

    Attributes:
        name: HELMET's dataset name, e.g. "json_kv" or "icl_nlu_510shot_balance".
        category: recall, rag, rerank, icl, longqa, summ, cite or ruler.
        length: most tokens of prompt and answer together.
        document_tokens: what the one long document of a prompt is cut to, where there is one (longqa, summ).
        template: the user's message; `{field}` of the row.
        answer_prefix: begins the answer of a base model; template likewise.
        load: reads or makes the rows.
        needs: files or directories under the data directory that `load` reads; or `instead`, when given.
        generated: without those files, `load` makes the rows itself.
        prose: when it makes them, it hides needles in the inputs' haystack.
        metrics: the scores that enter the averages.
        summarise: makes the averages (and more) from the finished items, instead of plain means.
        question: field that says which rows ask the same question (for confidence intervals).
    """

    name: str
    category: str
    length: int
    template: str
    answer_prefix: str
    load: Callable[[Task, Inputs], list[Row]]
    max_new_tokens: int
    metrics: tuple[str, ...]
    score: Score = score_text
    summarise: Summarise | None = None
    separator: str = "\n"
    chat: bool = False
    shots: int = 2
    document_tokens: int = 0
    max_samples: int = 100
    test_file: str = ""
    demo_file: str = ""
    needs: tuple[str, ...] = ()
    instead: str = ""
    generated: bool = False
    prose: bool = False
    question: str = "question"

    def rows(self, inputs: Inputs) -> list[Row]:
        """What `load` reads or makes; raises UserError, naming the task, when it cannot."""
        try:
            return self.load(self, inputs)
        except UserError as error:
            raise UserError(f"{self.name} at a length of {self.length:,} tokens: {error}") from error

    def samples(self, inputs: Inputs) -> int:
        """How many questions to ask."""
        return self.max_samples if inputs.max_samples is None else inputs.max_samples

    def missing(self, data: Path | None) -> list[str]:
        """What `load` would need and does not find."""
        if data is not None and self.instead and (data / self.instead).exists():
            return []
        return [name for name in self.needs if data is None or not (data / name).exists()]

    def files(self, data: Path | None) -> list[Path]:
        """The files and directories that `load` reads; none where it makes the rows itself, or cannot."""
        if data is None or self.missing(data):
            return []
        return [data / name for name in (*self.needs, self.instead) if name]


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The order of `datasets.Dataset.shuffle(seed=seed)`."""
    return [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]


def stable_seed(text: str, offset: int = 0) -> int:
    """A seed from a text, the same in every process: HELMET's sha256 rule."""
    return (int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16) + offset) % 2**31


def first_of_each(rows: Iterable[Row], field: str) -> list[Row]:
    """The first row of every value of a field, in order."""
    seen: dict[Any, Row] = {}
    for row in rows:
        seen.setdefault(row[field], row)
    return list(seen.values())

"""RULER's two question tasks: the paragraphs of SQuAD or HotpotQA that answer, among many that do not.

Reads the published files (RULER's names): squad.json (SQuAD v2 dev) and hotpotqa.json (dev, distractor).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_prolong.evaluation.synthetic.size import fitting_rows
from megatron_prolong.evaluation.task import Row


@dataclass(frozen=True)
class Question:
    """gold and related are numbers of documents; related ones come from the same article."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


def make_rows(
    source: Path, count_tokens: Callable[[Row], int], limit: int, num_rows: int, seed: int
) -> list[Row]:
    """Rows with context, question and answer."""
    documents, questions = _read(source)
    return fitting_rows(
        lambda count, index: _row(documents, questions, count, seed, index),
        count_tokens,
        limit,
        min(num_rows, len(questions)),
        start=8,
    )


def _row(documents: list[str], questions: list[Question], count: int, seed: int, index: int) -> Row:
    rng = random.Random(f"qa-{seed}-{index}")
    question = questions[index]
    shown = list(question.gold)
    room = max(0, count - len(shown))
    shown += rng.sample(question.related, min(room, len(question.related)))
    taken = {*question.gold, *question.related}
    others = [number for number in range(len(documents)) if number not in taken]
    while (room := count - len(shown)) > 0 and others:  # a corpus that is too small is repeated
        shown += rng.sample(others, min(room, len(others)))
    rng.shuffle(shown)
    context = "\n\n".join(
        f"Document {place}:\n{documents[number]}" for place, number in enumerate(shown, start=1)
    )
    return {
        "index": index,
        "context": context,
        "question": question.text,
        "answer": list(question.answers),
    }


def _read(source: Path) -> tuple[list[str], list[Question]]:
    content = json.loads(source.read_text(encoding="utf-8"))
    return _read_squad(content["data"]) if isinstance(content, dict) else _read_hotpotqa(content)


def _read_squad(articles: list[Row]) -> tuple[list[str], list[Question]]:
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for article in articles:
        related = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = number[paragraph["context"]]
            for asked in paragraph["qas"]:
                if not asked.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in asked["answers"])
                    others = tuple(place for place in related if place != gold)
                    questions.append(Question(asked["question"], answers, (gold,), others))
    return documents, questions


def _read_hotpotqa(entries: list[Row]) -> tuple[list[str], list[Question]]:
    def render(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({render(*part) for entry in entries for part in entry["context"]})
    number = {document: place for place, document in enumerate(documents)}
    questions = [
        Question(
            entry["question"],
            (entry["answer"],),
            tuple(number[render(*part)] for part in entry["context"]),
        )
        for entry in entries
    ]
    return documents, questions

"""Needle in a haystack: a sentence with a number is hidden at some depth of a long text and must be repeated.

Two scores per cell of the (length × depth) grid. *recall*: the generated text contains the number. *ranking*:
the number is more likely than every one of some made-up numbers of as many tokens; small models that cannot
yet generate the answer show here whether they find it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, ScoringBackend, encode
from megatron_prolong.evaluation.synthetic.size import largest_fit
from megatron_prolong.evaluation.words import random_number, random_words
from megatron_prolong.runtime.progress import track

# RULER's noise haystack (niah_single_1).
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRODUCTION = "A special magic number is hidden within the following text. Make sure to memorize it.\n"
NEEDLE = "The special magic number for {key} is {value}."
QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text?\n"
    "The special magic number for {key} is"
)
ANSWER_TOKENS = 16
DISTRACTORS = 9


@dataclass(frozen=True)
class Needle:
    """One trial. `distractors` are made-up values of as many tokens as `value`."""

    length: int
    depth: float
    prompt: Prompt
    value: str
    distractors: tuple[str, ...]


@dataclass(frozen=True)
class NeedleCell:
    """Shares (0 to 1) over the trials of one length (tokens) and depth (0 = start, 1 = end)."""

    length: int
    depth: float
    trials: int
    recall: float
    ranked_first: float
    margin: float
    """Mean log-probability of the number minus that of the best distractor, in nats."""


def make_needle(tokenizer: Any, haystack: str, length: int, depth: float, seed: int) -> Needle:
    """A prompt of at most `length` tokens (less than one sentence shorter), the answer's tokens included.

    The haystack is repeated when it is too short. Same arguments, same prompt.

    Raises:
        UserError: not even the needle, its question and one sentence fit.
    """
    rng = random.Random(f"{seed}-{length}-{depth}")
    key = random_words(rng)
    value, distractors = _numbers(tokenizer, rng)
    room = length - ANSWER_TOKENS
    sentences = sentences_of(haystack)
    start = rng.randrange(len(sentences))  # so that trials see different text

    def render(count: int) -> Prompt:
        body = [sentences[(start + index) % len(sentences)] for index in range(count)]
        body.insert(round(depth * count), NEEDLE.format(key=key, value=value))
        return Prompt(INTRODUCTION + " ".join(body) + QUESTION.format(key=key))

    def count_tokens(count: int) -> int:
        return len(encode(tokenizer, render(count)))

    if (least := count_tokens(1)) > room:
        raise UserError(
            f"needle at a length of {length} tokens: with its question, answer and one sentence it takes "
            f"{least + ANSWER_TOKENS}; ask for longer --lengths ({length}K is {length << 10:,})"
        )
    return Needle(length, depth, render(largest_fit(count_tokens, room)), value, distractors)


def run(
    backend: ScoringBackend,
    haystack: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int,
    seed: int,
) -> list[NeedleCell]:
    """Fill the grid: `trials` needles per cell, one pass over each prompt for ranking and one for recall."""
    grid = [(length, depth) for length in lengths for depth in depths]
    cells = []
    for length, depth in track(grid, sum(lengths) * len(depths), "needle", amount=lambda cell: cell[0]):
        needles = [
            make_needle(backend.tokenizer, haystack, length, depth, seed + trial) for trial in range(trials)
        ]
        cells.append(_score(backend, needles))
    return cells


def _score(backend: ScoringBackend, needles: Sequence[Needle]) -> NeedleCell:
    outputs = backend.generate([needle.prompt for needle in needles], ANSWER_TOKENS)
    hits = [needle.value in output for needle, output in zip(needles, outputs, strict=True)]
    margins = _margins(backend, needles)
    return NeedleCell(
        length=needles[0].length,
        depth=needles[0].depth,
        trials=len(needles),
        recall=sum(hits) / len(needles),
        ranked_first=sum(margin > 0 for margin in margins) / len(needles),
        margin=sum(margins) / len(needles),
    )


def _margins(backend: ScoringBackend, needles: Sequence[Needle]) -> list[float]:
    tokenizer = backend.tokenizer
    answers = backend.continuation_logprobs(
        [
            (
                encode(tokenizer, needle.prompt),
                [_value_ids(tokenizer, value) for value in (needle.value, *needle.distractors)],
            )
            for needle in needles
        ]
    )
    return [right - max(wrong) for right, *wrong in answers]


def _numbers(tokenizer: Any, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A 7-digit number and distractors that take as many tokens, so that no length is favoured."""
    value = random_number(rng)
    size = len(_value_ids(tokenizer, value))
    distractors: list[str] = []
    while len(distractors) < DISTRACTORS:
        other = random_number(rng)
        if other != value and other not in distractors and len(_value_ids(tokenizer, other)) == size:
            distractors.append(other)
    return value, tuple(distractors)


def _value_ids(tokenizer: Any, value: str) -> list[int]:
    return list(tokenizer(f" {value}", add_special_tokens=False)["input_ids"])


@cache
def sentences_of(text: str) -> tuple[str, ...]:
    """A text cut after every full stop, exclamation and question mark; blanks and line breaks become one blank."""
    return tuple(re.split(r"(?<=[.!?])\s+", " ".join(text.split())))

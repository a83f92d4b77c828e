"""RULER's two aggregation tasks: the ten common words of a numbered list, the three most frequent code words."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable

from megatron_prolong.evaluation.synthetic.size import fitting_rows
from megatron_prolong.evaluation.task import Row
from megatron_prolong.evaluation.words import word_list

COMMON = 10
SHORT_LENGTH = 4096  # below it RULER repeats words less often; so do we where ten words do not fit
CODE_LETTERS = 6
ZETA_2 = math.pi**2 / 6
COMMON_PROBLEM = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
    "that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_ANSWER = "Answer: The top 10 words that appear most often in the list are:"


def make_common_rows(
    count_tokens: Callable[[Row], int], length: int, limit: int, num_rows: int, seed: int
) -> list[Row]:
    """cwe: rows with context, answer (the common words) and example."""
    short = length < SHORT_LENGTH or count_tokens(_common_row(0, False, seed, 0)) > limit
    return fitting_rows(
        lambda count, index: _common_row(count, short, seed, index), count_tokens, limit, num_rows
    )


def make_frequent_rows(
    count_tokens: Callable[[Row], int], length: int, limit: int, num_rows: int, seed: int
) -> list[Row]:
    """fwe: rows with context and answer (the second to fourth most frequent; the first is dots)."""
    return fitting_rows(
        lambda count, index: _frequent_row(count * 16, length, seed, index), count_tokens, limit, num_rows
    )


def _common_row(num_words: int, short: bool, seed: int, index: int) -> Row:
    rng = random.Random(f"cwe-{seed}-{index}")
    words = sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")})
    example_context, example_common = _numbered(rng, words, *((20, 3, 1) if short else (40, 10, 3)))
    listed = " ".join(f"{place}. {word}" for place, word in enumerate(example_common, start=1))
    context, common = _numbered(rng, words, max(num_words, COMMON + 1), *((6, 1) if short else (30, 3)))
    return {
        "index": index,
        "context": context,
        "answer": common,
        "example": f"{COMMON_PROBLEM.format(context=example_context)} {COMMON_ANSWER} {listed}",
    }


def _numbered(
    rng: random.Random, words: list[str], num_words: int, common_repeats: int, uncommon_repeats: int
) -> tuple[str, list[str]]:
    """The numbered list, and its common words. Beyond the word list, words get a number as ending."""
    pool = words
    if num_words > len(words):
        pool = [f"{word}{ending or ''}" for ending in range(-(-num_words // len(words))) for word in words]
    chosen = rng.sample(pool, num_words)
    common, uncommon = chosen[:COMMON], chosen[COMMON:]
    listed = common * common_repeats + uncommon * uncommon_repeats
    rng.shuffle(listed)
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1)), common


def _frequent_row(num_words: int, length: int, seed: int, index: int) -> Row:
    """Word of rank k appears ⌊N·k⁻²/ζ(2)⌋ times."""
    rng = random.Random(f"fwe-{seed}-{index}")
    names: dict[str, None] = {}
    while len(names) < max(length // 50, 4):
        names.setdefault("".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS)))
    vocabulary = ["...", *list(names)[1:]]
    text: list[str] = []
    for rank, word in enumerate(vocabulary, start=1):
        text += [word] * int(num_words / rank**2 / ZETA_2)
    rng.shuffle(text)
    return {"index": index, "context": " ".join(text), "answer": vocabulary[1:4]}

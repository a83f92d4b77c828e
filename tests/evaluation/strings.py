"""Strings that look like what models write: answers, lists, rankings, citations, repeated prefixes, oddities."""

from __future__ import annotations

import random

WORDS = [
    "the", "a", "an", "The", "Paris", "paris", "New", "York", "yes", "no", "noanswer", "running", "runner", "runs",
    "1989", "3,000", "U.S.", "don't", "café", "北京", "re-rank", "(born", "1950)", "A", "B.", "C",
    "option", "hotel", "Answer:", "answer:",
    "Summary:", "label:", "12", "[1]", "[2][3]", "ID:", "id", ">", "–", "…", "\t", "",
]  # fmt: skip
JOINERS = [" ", " ", " ", " ", "\n", ", ", ". "]
PREFIXES = ["", "", "Answer:", "Answer: ", "ANSWER: answer: ", "Corresponding value:", "Summary:", "label:"]


def sentence(rng: random.Random, most: int = 12) -> str:
    """A few words with a separator each, perhaps after a prefix; now and then empty."""
    text = rng.choice(PREFIXES)
    for _ in range(rng.randint(0, most)):
        text += rng.choice(WORDS) + rng.choice(JOINERS)
    return text


def answers(rng: random.Random) -> list[str]:
    """One to three answers; now and then a part of nothing."""
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]


def ranking(rng: random.Random) -> str:
    """A generated ranking: ids with arrows, brackets, prefixes, chatter, repetitions."""
    parts = []
    for _ in range(rng.randint(0, 3)):
        ids = [str(rng.randint(1, 30)) for _ in range(rng.randint(1, 15))]
        style = rng.choice(["{}", "ID{}", "[{}]", "[ID: {}]", "ID: {}"])
        parts.append(rng.choice([" > ", ">", " >", ", ", "\n> "]).join(style.format(name) for name in ids))
        parts.append(
            rng.choice(["", "\nRanking: ", " because it is best. ", "\n\nQuery: what? ", "identity 7 "])
        )
    return "".join(parts)

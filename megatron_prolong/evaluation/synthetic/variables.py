"""RULER's variable tracking: a chain of five assignments in noise; name every variable that has the value."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from itertools import pairwise

from megatron_prolong.evaluation.needle import NOISE
from megatron_prolong.evaluation.synthetic.size import fitting_rows
from megatron_prolong.evaluation.task import Row

HOPS = 4
EXAMPLE_NOISES = 5  # RULER fills an example of at most 500 tokens: about this many noise units
PROBLEM = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
ANSWER = (
    "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are:"
)


def make_rows(count_tokens: Callable[[Row], int], limit: int, num_rows: int, seed: int) -> list[Row]:
    """Rows in HELMET's fields (context, query, answer, num_v, example)."""
    return fitting_rows(lambda count, index: _row(count, seed, index), count_tokens, limit, num_rows)


def _row(count: int, seed: int, index: int) -> Row:
    rng = random.Random(f"vt-{seed}-{index}")
    example_context, example_value, example_names = _chain(rng, EXAMPLE_NOISES, letters=3)
    fields = {"context": example_context, "query": example_value, "num_v": HOPS + 1}
    example = f"{PROBLEM.format(**fields)} {ANSWER.format(**fields)} {' '.join(example_names)}"
    context, value, names = _chain(rng, max(count, HOPS + 1), letters=5)
    return {
        "index": index,
        "context": context,
        "query": value,
        "answer": names,
        "num_v": HOPS + 1,
        "example": example,
    }


def _chain(rng: random.Random, noises: int, letters: int) -> tuple[str, str, list[str]]:
    """The text, the value, and the names of the variables that have it."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in pairwise(names)]
    lines = [NOISE] * noises
    for order, place in enumerate(sorted(rng.sample(range(noises), len(chain)))):
        lines.insert(place + order, chain[order])
    return "\n".join(lines).replace(". \n", ".\n"), value, names

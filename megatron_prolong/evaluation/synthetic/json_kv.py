"""JSON key/value retrieval (Lost in the Middle): find one of many random UUID pairs.

Rows have HELMET's fields. Every object is asked six times, with the gold pair at six evenly spaced places
(HELMET's "dep6"); two demonstrations use other pairs of the same object.
"""

from __future__ import annotations

import random

from megatron_prolong.evaluation.task import Row
from megatron_prolong.evaluation.words import random_uuid

DEPTHS = 6
MAX_SHOTS = 2


def make_rows(num_pairs: int, num_rows: int, seed: int) -> list[Row]:
    """`num_rows` rows over ⌈num_rows/6⌉ objects of `num_pairs` pairs."""
    rows: list[Row] = []
    for number in range(-(-num_rows // DEPTHS)):
        rng = random.Random(f"json_kv-{seed}-{num_pairs}-{number}")
        pairs = [(random_uuid(rng), random_uuid(rng)) for _ in range(num_pairs)]
        gold, others = pairs[0], pairs[1:]
        for depth in range(DEPTHS):
            place = round(depth * len(others) / (DEPTHS - 1))
            ordered = [*others[:place], gold, *others[place:]]
            rows.append(
                {
                    "context": render(ordered),
                    "question": gold[0],
                    "answer": gold[1],
                    "demos": [list(pair) for pair in rng.sample(others, min(MAX_SHOTS, len(others)))],
                    "num_kvs": num_pairs,
                    "depth": depth / (DEPTHS - 1),
                }
            )
    return rows[:num_rows]


def render(pairs: list[tuple[str, str]]) -> str:
    """The object as the prompt shows it."""
    lines = ",\n".join(f'    "{key}": "{value}"' for key, value in pairs)
    return f"JSON data:\n{{\n{lines}\n}}\n"

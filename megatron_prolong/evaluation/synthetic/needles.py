"""RULER's eight needle tasks: keys and values of several kinds hidden in noise, prose, or other needles."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_prolong.evaluation.needle import NOISE, sentences_of
from megatron_prolong.evaluation.synthetic.size import fitting_rows
from megatron_prolong.evaluation.task import Row
from megatron_prolong.evaluation.words import random_number, random_uuid, random_words

RANDOM = {"words": random_words, "numbers": random_number, "uuids": random_uuid}
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclass(frozen=True)
class NeedleKind:
    """One needle task (RULER's synthetic.yaml). haystack: noise, prose, or needle (distractors all the way)."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_s_1": NeedleKind("noise"),
    "niah_s_2": NeedleKind("prose"),
    "niah_s_3": NeedleKind("prose", value="uuids"),
    "niah_mk_1": NeedleKind("prose", keys=4),
    "niah_mk_2": NeedleKind("needle"),
    "niah_mk_3": NeedleKind("needle", key="uuids", value="uuids"),
    "niah_mv": NeedleKind("prose", values=4),
    "niah_mq": NeedleKind("prose", keys=4, queries=4),
}


def make_rows(
    kind: NeedleKind,
    count_tokens: Callable[[Row], int],
    limit: int,
    num_rows: int,
    seed: int,
    prose: str = "",
) -> list[Row]:
    """Rows in HELMET's fields (context, query, answer, type_needle_v).

    Args:
        count_tokens: of the prompt that a row makes.
        limit: most tokens of that prompt.
        prose: any text; without it, prose haystacks are RULER's noise.
    """
    units = sentences_of(prose) if prose and kind.haystack == "prose" else (NOISE,)
    return fitting_rows(
        lambda count, index: _row(kind, units, count, seed, index), count_tokens, limit, num_rows
    )


def _row(kind: NeedleKind, units: tuple[str, ...], count: int, seed: int, index: int) -> Row:
    rng = random.Random(f"{kind}-{seed}-{index}")
    new_key, new_value = RANDOM[kind.key], RANDOM[kind.value]
    keys = [new_key(rng) for _ in range(kind.keys)]
    values = {key: [new_value(rng) for _ in range(kind.values)] for key in keys}
    needles = [NEEDLE.format(kind=kind.value, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    queries = rng.sample(keys, kind.queries)
    start = rng.randrange(len(units))
    count = max(count, len(needles))
    if kind.haystack == "needle":
        body = [NEEDLE.format(kind=kind.value, key=new_key(rng), value=new_value(rng)) for _ in range(count)]
    else:
        body = [units[(start + place) % len(units)] for place in range(count)]
    for place, needle in zip(
        sorted(rng.sample(range(count), len(needles)), reverse=True), needles, strict=True
    ):
        body.insert(place, needle)
    singular = kind.queries * kind.values == 1
    return {
        "index": index,
        "context": (" " if len(units) > 1 else "\n").join(body),
        "query": _listing(queries),
        "answer": [value for query in queries for value in values[query]],
        "type_needle_v": kind.value[:-1] if singular else kind.value,
    }


def _listing(names: list[str]) -> str:
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]

"""Many-shot in-context classification: TREC coarse and fine, NLU, Banking77, Clinc150, with number labels."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megatron_prolong.evaluation.rows import read_split
from megatron_prolong.evaluation.task import Inputs, Row, Scored, Task, shuffled, stable_seed
from megatron_prolong.evaluation.text_metrics import parse_output, text_metrics

TEMPLATE = (
    'Use the provided mapping from the text to label to assign a label to the text. Only output "label: '
    '{{label}}" and nothing else. \n\n{context}\n\n{question}'
)


@dataclass(frozen=True)
class LabelSet:
    """One data set: its folder and label field, and HELMET's number of shots at each of LENGTHS."""

    folder: str
    label: str
    num_labels: int
    shots: tuple[int, ...]
    test_split: str | None = "test"
    """None: a tenth of the only split, chosen by the seed."""


LENGTHS = (8192, 16384, 32768, 65536, 131072)
SETS = {
    "trec_coarse": LabelSet("trec", "coarse_label", 6, (400, 800, 1600, 3300, 6600)),
    "trec_fine": LabelSet("trec", "fine_label", 50, (400, 800, 1600, 3200, 6400)),
    "banking77": LabelSet("banking77", "label", 77, (360, 720, 1450, 2900, 5900)),
    "clinic150": LabelSet("clinc_oos", "intent", 151, (440, 880, 1750, 3525, 7050), "validation"),
    "nlu": LabelSet("nlu_evaluation_data", "label", 68, (510, 1020, 2040, 4080, 8296), None),
}


def icl_tasks(length: int) -> list[Task]:
    """The five tasks; HELMET has shot counts for 8K to 128K only."""
    if length not in LENGTHS:
        return []
    return [_task(name, labels, length) for name, labels in SETS.items()]


def _task(name: str, labels: LabelSet, length: int) -> Task:
    shots = labels.shots[LENGTHS.index(length)]
    return Task(
        name=f"icl_{name}_{shots}shot_balance",
        category="icl",
        length=length,
        template=TEMPLATE,
        answer_prefix="label:",
        load=partial(_load, labels, shots),
        score=_score,
        max_new_tokens=20,
        metrics=("exact_match",),
        shots=0,
        max_samples=500,
        needs=(f"hf/{labels.folder}",),
    )


def _load(labels: LabelSet, shots: int, task: Task, inputs: Inputs) -> list[Row]:
    assert inputs.data is not None
    directory = inputs.data / "hf" / labels.folder
    train = read_split(directory, "train")
    if labels.test_split is None:
        train, test = _tenth(train, inputs.seed)
    else:
        test = read_split(directory, labels.test_split)
    wanted = task.samples(inputs)
    if len(test) > wanted:
        test = balanced(shuffled(test, inputs.seed), wanted, inputs.seed, labels.label)
    return [_fill(row, train, labels, shots, inputs.seed) for row in test]


def _tenth(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """(train, test) of `datasets.train_test_split(test_size=0.1, seed=seed)`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = math.ceil(0.1 * len(rows))
    return [rows[index] for index in order[cut:]], [rows[index] for index in order[:cut]]


def balanced(rows: Sequence[Row], count: int, seed: int, label: str) -> list[Row]:
    """`count` rows in rounds that hold every label once, each round in random order (HELMET's balance_labels)."""
    rng = random.Random(seed)
    by_label: dict[int, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row[label], []).append(row)
    num_rounds = math.ceil(count / len(by_label))
    rounds: list[list[Row]] = [[] for _ in range(num_rounds)]
    for group in by_label.values():
        indices = rng.sample(range(len(group)), num_rounds % len(group))
        while len(indices) < num_rounds:
            indices += rng.sample(range(len(group)), min(num_rounds - len(indices), len(group)))
        for place, index in enumerate(indices):
            rounds[place].append(group[index])
    for one_round in rounds:
        rng.shuffle(one_round)
    return [row for one_round in rounds for row in one_round][:count]


def _fill(row: Row, train: Sequence[Row], labels: LabelSet, shots: int, seed: int) -> Row:
    """Demonstrations and the meaning of the number labels depend on the text, so each question has its own."""
    row_seed = stable_seed(row["text"], seed)
    demos = balanced(train, shots, row_seed, labels.label)
    numbers = list(range(labels.num_labels))
    random.Random(row_seed).shuffle(numbers)
    context = "\n\n".join(f"{demo['text']}\nlabel: {numbers[int(demo[labels.label])]}" for demo in demos)
    return {
        **row,
        "context": context,
        "question": row["text"],
        "answer": str(numbers[int(row[labels.label])]),
    }


def _score(output: str, row: Row) -> Scored:
    parsed = parse_output(output, "label:")
    return Scored(text_metrics(parsed, row["answer"]), parsed)

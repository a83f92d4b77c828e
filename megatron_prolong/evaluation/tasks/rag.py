"""Retrieval-augmented question answering (KILT's NQ, TriviaQA and HotpotQA, and PopQA)."""

from __future__ import annotations

import math
import random
from typing import Any

from megatron_prolong.evaluation.rows import read_chosen, read_rows
from megatron_prolong.evaluation.task import (
    Inputs,
    Row,
    Task,
    first_of_each,
    shuffled,
    stable_seed,
)

PASSAGES = {4096: 20, 8192: 50, 16384: 105, 32768: 220, 65536: 440, 131072: 1000}
TEMPLATE = (
    "Use the given documents to write a concise and short answer to the question. "
    "Write your answer in the following format:\nAnswer: [answer]\n\n{demos}{context}\n\nQuestion: {question}"
)
# Its questions are about things that fewer than 10^3 people look up in a month.
POPQA, MOST_POPULAR = "kilt_popqa_3", 3.0
FILES = {
    "kilt_nq": ("nq-dev-multikilt_1000_k{k}_dep6", "nq-train-multikilt_1000_k3_dep6"),
    "kilt_triviaqa": ("triviaqa-dev-multikilt_1000_k{k}_dep6", "triviaqa-train-multikilt_1000_k3_dep6"),
    "kilt_hotpotqa": ("hotpotqa-dev-multikilt_1000_k{k}_dep3", "hotpotqa-train-multikilt_1000_k3_dep3"),
    POPQA: ("popqa_test_1000_k{k}_dep6", "popqa_test_1000_k3_dep6"),
}


def rag_tasks(length: int) -> list[Task]:
    """The four tasks; HELMET has data for 4K to 128K only."""
    if length not in PASSAGES:
        return []
    tasks = []
    for name, (test, demo) in FILES.items():
        test_file, demo_file = f"kilt/{test.format(k=PASSAGES[length])}.jsonl", f"kilt/{demo}.jsonl"
        tasks.append(
            Task(
                name=name,
                category="rag",
                length=length,
                template=TEMPLATE,
                answer_prefix="Answer:",
                load=_load,
                max_new_tokens=20,
                metrics=("substring_exact_match",),
                test_file=test_file,
                demo_file=demo_file,
                needs=(test_file, demo_file),
                question="id" if name == POPQA else "question",
            )
        )
    return tasks


def _load(task: Task, inputs: Inputs) -> list[Row]:
    """All rows of the chosen questions: the gold passages of one question stand at several depths."""
    assert inputs.data is not None
    popqa = task.name == POPQA
    demos = [row for row in read_rows(inputs.data / task.demo_file) if not popqa or _is_rare(row)]

    def name(row: Row) -> Any:
        return row.get("id", row["question"]) if not popqa or _is_rare(row) else None

    def choose(names: set[Any]) -> set[Any]:
        return set(random.Random(inputs.seed).sample(sorted(names), min(task.samples(inputs), len(names))))

    rows = read_chosen(inputs.data / task.test_file, name, choose)
    key = "id" if rows and "id" in rows[0] else "question"
    return [_fill(row, demos, key, task.shots, popqa) for row in rows]


def _is_rare(row: Row) -> bool:
    """Whether PopQA's question is about something little known."""
    return math.log10(row["s_pop"]) < MOST_POPULAR


def _fill(row: Row, pool: list[Row], key: str, shots: int, same_split: bool) -> Row:
    """Demonstrations depend on the question alone, so that all its depths share them."""
    if same_split:
        pool = [demo for demo in pool if demo[key] != row[key]]
    chosen = first_of_each(shuffled(pool, stable_seed(str(row[key]))), key)[:shots]
    demos = "".join(
        f"{_passages(demo)}\n\nQuestion: {demo['question']}\nAnswer: {demo['answers'][0]}\n\n"
        for demo in chosen
    )
    return {**row, "demos": demos, "context": _passages(row), "answer": row["answers"]}


def _passages(row: Row) -> str:
    return "\n\n".join(f"Document (Title: {passage['title']}): {passage['text']}" for passage in row["ctxs"])

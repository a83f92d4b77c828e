"""Summaries of one long document: ∞Bench books and Multi-LexSum court cases."""

from __future__ import annotations

import random

from megatron_prolong.evaluation.rows import read_rows, read_split
from megatron_prolong.evaluation.task import Inputs, Row, Scored, Task, score_text, shuffled, stable_seed
from megatron_prolong.evaluation.tasks.long_documents import document_cutter
from megatron_prolong.evaluation.tasks.longqa import load_infbench

BOOK = (
    "You are given a book and you are tasked to summarize it. Write a summary of about 1000 to 1200 words. Only "
    "write about the plot and characters of the story. Do not discuss the themes or background of the book. Do "
    "not provide any analysis or commentary.\n\n{demo}{context}\n\nNow summarize the book."
)
CASE = (
    "You are given the legal documents in a civil rights lawsuit, and you are tasked to summarize the case. "
    "Write a concise summary of one paragraph (200 to 250 words). The summary should contain a short description "
    "of the background, the parties involved, and the outcomes of the case.\n\n{demo}Legal documents:\n{context}"
    "\n\nNow please summarize the case."
)
CASE_MIN_TOKENS = 65536
BOOK_KEY_POINTS = "infbench/longbook_sum_eng_keypoints.jsonl"
CASE_KEY_POINTS = "multi_lexsum/multi_lexsum_val.jsonl"


def summ_tasks(length: int) -> list[Task]:
    """The two tasks, at any length."""
    book, case = length - 200 - 1200, length - 300 - 400
    return [
        Task(
            name=f"infbench_sum_eng_{book}",
            category="summ",
            length=length,
            document_tokens=book,
            template=BOOK,
            answer_prefix="Summary:",
            separator="\n\n",
            load=_load_books,
            max_new_tokens=1200,
            metrics=("gpt-4-f1",),
            chat=True,
            needs=("hf/infinitebench",),
            question="id",
        ),
        Task(
            name=f"multi_lexsum_{case}",
            category="summ",
            length=length,
            document_tokens=case,
            template=CASE,
            answer_prefix="Summary:",
            separator="\n\n",
            load=_load_cases,
            score=_score_case,
            max_new_tokens=400,
            metrics=("gpt-4-f1",),
            chat=True,
            needs=("hf/multi_lexsum",),
            question="id",
        ),
    ]


def _load_books(task: Task, inputs: Inputs) -> list[Row]:
    rows = load_infbench("longbook_sum_eng", _book_example, task, inputs)
    return _with_key_points(rows, inputs, BOOK_KEY_POINTS, "keypoints")


def _book_example(row: Row) -> str:
    return f"Summary: {row['answer'][0].strip()}"


def _load_cases(task: Task, inputs: Inputs) -> list[Row]:
    assert inputs.data is not None
    directory = inputs.data / "hf" / "multi_lexsum"
    shown = document_cutter(inputs, CASE_MIN_TOKENS, task.document_tokens)
    examples = read_split(directory, "train", ["summary/short"])
    train = [row for row in examples if row["summary/short"] is not None]
    rows = []
    for row in read_split(directory, "validation"):
        if row["summary/short"] is None:
            continue
        context = shown("\n\n".join(row["sources"]))
        if context is None:
            continue
        rows.append(
            {
                **row,
                "context": context,
                "question": "",
                "answer": row["summary/short"],
                "demo": _case_demo(train, task.shots, stable_seed(str(row["id"]), inputs.seed)),
            }
        )
    if len(rows) > task.samples(inputs):
        rows = shuffled(rows, inputs.seed)[: task.samples(inputs)]
    return _with_key_points(rows, inputs, CASE_KEY_POINTS, "summary/short_keypoints")


def _case_demo(train: list[Row], shots: int, seed: int) -> str:
    """HELMET draws these without a seed; here the case seeds them."""
    if not shots:
        return ""
    chosen = random.Random(seed).sample(train, min(shots, len(train)))
    examples = "\n\n".join(f"Summary: {row['summary/short']}" for row in chosen)
    return f"Example summaries:\n\n{examples}\n\nNow, write a summary of the following legal documents.\n"


def _with_key_points(rows: list[Row], inputs: Inputs, file: str, field: str) -> list[Row]:
    """The judge's key points, where the data directory has them."""
    assert inputs.data is not None
    path = inputs.data / file
    if not path.exists():
        return rows
    points = {str(row["id"]): row[field] for row in read_rows(path)}
    return [{**row, "keypoints": points[str(row["id"])]} if str(row["id"]) in points else row for row in rows]


def _score_case(output: str, row: Row) -> Scored:
    return score_text(output, row, prefix="Summary:")

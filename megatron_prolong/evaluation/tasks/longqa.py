"""Questions about one long document: NarrativeQA, ∞Bench QA and multiple choice."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from megatron_prolong.evaluation.rows import read_split
from megatron_prolong.evaluation.task import Inputs, Row, Scored, Task, score_text, shuffled, stable_seed
from megatron_prolong.evaluation.tasks.long_documents import document_cutter

NARRATIVE = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "as concisely as you can, using a single phrase if possible.\n\n{demo}{context}\n\nQuestion: {question}"
)
QUESTION = (
    "You are given a story and a question. Answer the question as concisely as you can, using a single phrase "
    "if possible.\n\n{demo}{context}\n\nQuestion: {question}"
)
CHOICE = (
    "You are given a story and a question with multiple choices. Choose the best answer from the options "
    "provided. Only one of the following options is correct, output the answer using one single letter "
    "(A, B, C, or D). Don't say anything else.\n\n{demo}{context}\n\nQuestion: {question}\nOptions:\n{options}"
)
QUESTION_EXAMPLE = "Question: {question}\nAnswer: {answer[0]}"
CHOICE_EXAMPLE = "Question: {question}\nOptions:\n{options}\nAnswer: {answer[0]}"
PROMPT_TOKENS = 200  # HELMET leaves this much for everything but document and answer
NARRATIVE_MIN_TOKENS = 131072  # only documents longer than this are asked, at every length
INFBENCH_MIN_TOKENS = 65536


def longqa_tasks(length: int) -> list[Task]:
    """The three tasks, at any length."""
    narrative = length - PROMPT_TOKENS - 100
    infbench = length - PROMPT_TOKENS - 10
    return [
        Task(
            name=f"narrativeqa_{narrative}",
            category="longqa",
            length=length,
            document_tokens=narrative,
            template=NARRATIVE,
            answer_prefix="Answer:",
            load=_load_narrative,
            max_new_tokens=100,
            metrics=("gpt-4-score",),
            chat=True,
            needs=("hf/narrativeqa",),
        ),
        Task(
            name=f"infbench_qa_eng_{infbench}",
            category="longqa",
            length=length,
            document_tokens=infbench,
            template=QUESTION,
            answer_prefix="Answer:",
            separator="\n\n",
            load=partial(load_infbench, "longbook_qa_eng", QUESTION_EXAMPLE.format_map),
            max_new_tokens=10,
            metrics=("rougeL_f1",),
            chat=True,
            needs=("hf/infinitebench",),
        ),
        Task(
            name=f"infbench_choice_eng_{infbench}",
            category="longqa",
            length=length,
            document_tokens=infbench,
            template=CHOICE,
            answer_prefix="Answer:",
            separator="\n\n",
            load=partial(load_infbench, "longbook_choice_eng", CHOICE_EXAMPLE.format_map),
            score=_score_choice,
            max_new_tokens=10,
            metrics=("exact_match",),
            chat=True,
            needs=("hf/infinitebench",),
        ),
    ]


def _load_narrative(task: Task, inputs: Inputs) -> list[Row]:
    assert inputs.data is not None
    directory = inputs.data / "hf" / "narrativeqa"
    shown = document_cutter(inputs, NARRATIVE_MIN_TOKENS + 1, task.document_tokens)
    examples = read_split(directory, "train", ["question", "answers"])
    train = [(row["question"]["text"], row["answers"][0]["text"]) for row in examples]
    rows: list[Row] = []
    for row in shuffled(read_split(directory, "test"), inputs.seed):
        context = shown(row["document"]["text"])
        if context is None:
            continue
        question = row["question"]["text"]
        kept = {name: value for name, value in row.items() if name not in ("document", "answers")}
        rows.append(
            {
                **kept,
                "context": context,
                "question": question,
                "answer": [answer["text"] for answer in row["answers"]],
                "demo": _narrative_demo(train, task.shots, stable_seed(question, inputs.seed)),
            }
        )
        if len(rows) == task.samples(inputs):
            break
    return rows


def _narrative_demo(train: list[tuple[str, str]], shots: int, seed: int) -> str:
    """HELMET draws these without a seed; here the question seeds them."""
    if not shots:
        return ""
    chosen = random.Random(seed).sample(train, min(shots, len(train)))
    examples = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in chosen)
    return f"For example:\n\n{examples}\n\nNow, use the following story to answer the question:\n\n"


def load_infbench(split: str, example: Callable[[Row], str], task: Task, inputs: Inputs) -> list[Row]:
    """One of ∞Bench's splits; `example` is what a demonstration shows of another row."""
    assert inputs.data is not None
    shown = document_cutter(inputs, INFBENCH_MIN_TOKENS, task.document_tokens)
    rows = [_infbench_row(row, split) for row in read_split(inputs.data / "hf" / "infinitebench", split)]
    long = [row for row in rows if shown(row["context"]) is not None]
    return [
        {
            **row,
            "demo": _infbench_demo(row, rows, example, task.shots, inputs.seed),
            "context": shown(row["context"]),
        }
        for row in shuffled(long, inputs.seed)[: task.samples(inputs)]
    ]


def _infbench_row(row: Row, split: str) -> Row:
    filled = {**row, "question": row["input"]}
    if split == "longbook_choice_eng":
        letter = "ABCD"[row["options"].index(row["answer"][0])]
        filled["options"] = "\n".join(
            f"{name}. {option}" for name, option in zip("ABCD", row["options"], strict=True)
        )
        filled["answer"] = [letter, f"{letter}. {row['answer'][0]}"]
    return filled


def _infbench_demo(row: Row, rows: list[Row], example: Callable[[Row], str], shots: int, seed: int) -> str:
    """Two other rows of the same split, without their stories."""
    if not shots:
        return ""
    others = shuffled([other for other in rows if other["id"] != row["id"]], seed)[:shots]
    examples = "\n\n".join(f"[story text]\n{example(other)}" for other in others)
    return f"For example:\n\n{examples}\n\nNow, read the following story:\n\n"


def _score_choice(output: str, row: Row) -> Scored:
    """The letter as a text answer, or the whole "X. option" anywhere in the output."""
    scored = score_text(output, row)
    named = row["answer"][1].lower() in output.lower()
    scores = {**scored.scores, "substring_exact_match": named}
    return Scored({**scores, "exact_match": True} if named else scores, scored.parsed)

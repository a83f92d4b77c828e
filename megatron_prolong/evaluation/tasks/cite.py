"""Answers with citations (ALCE): ASQA and QAMPARI over up to 700 retrieved passages."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from megatron_prolong.evaluation.alce import summarise
from megatron_prolong.evaluation.rows import read_rows
from megatron_prolong.evaluation.task import Inputs, Row, Task, shuffled
from megatron_prolong.recipe.shape import read_json

PASSAGES = {4096: 8, 8192: 30, 16384: 75, 32768: 165, 65536: 345, 131072: 700}


def cite_tasks(length: int) -> list[Task]:
    """ASQA and QAMPARI; HELMET has passage counts for 4K to 128K only."""
    if length not in PASSAGES:
        return []
    return [_task(name, length, PASSAGES[length]) for name in ("asqa", "qampari")]


def _task(name: str, length: int, passages: int) -> Task:
    listed = name == "qampari"
    test_file, demo_file = f"alce/{name}_eval_gtr_top2000.json", f"prompts/{name}_revised.json"
    answer_score = "qampari_rec_top5" if listed else "str_em"
    return Task(
        name=f"alce_{name}_{passages}",
        category="cite",
        length=length,
        template="{demo_text}{instruction}\n\nQuestion: {question}\n\n{context}",
        answer_prefix="Answer:",
        separator="\n\n",
        load=partial(_load, passages),
        summarise=partial(summarise, listed=listed),
        max_new_tokens=300,
        metrics=(answer_score, "citation_rec", "citation_prec"),
        chat=True,
        test_file=test_file,
        demo_file=demo_file,
        needs=(test_file, demo_file),
    )


def _load(passages: int, task: Task, inputs: Inputs) -> list[Row]:
    """Demonstrations are drawn row by row in the order of the file, then the rows are shuffled (as HELMET does)."""
    assert inputs.data is not None
    prompts = read_json(inputs.data / task.demo_file)
    rng = random.Random(inputs.seed)
    rows = []
    for row in read_rows(inputs.data / task.test_file):
        demos = rng.sample(prompts["demos"], task.shots)
        rows.append(
            {
                **row,
                "context": _documents(prompts, row["docs"][:passages]),
                "demo_text": "".join(f"{_demo(prompts, demo)}\n\n\n" for demo in demos),
                "instruction": prompts["instruction"],
            }
        )
    return shuffled(rows, inputs.seed)[: task.samples(inputs)]


def _demo(prompts: dict[str, Any], demo: Row) -> str:
    filled = {**demo, "instruction": prompts["instruction"], "context": _documents(prompts, demo["docs"])}
    return str(prompts["demo_prompt"]).format(**filled)


def _documents(prompts: dict[str, Any], documents: list[Row]) -> str:
    return "\n\n".join(
        prompts["doc_prompt"].format(**document, ID=number)
        for number, document in enumerate(documents, start=1)
    )

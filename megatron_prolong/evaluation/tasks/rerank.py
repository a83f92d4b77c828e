"""Passage re-ranking (MS MARCO, TREC Deep Learning 2019): NDCG@10 of a generated ranking of ids."""

from __future__ import annotations

import random

from megatron_prolong.evaluation.ranking import CUT_OFFS, parse_ranking, ranking_metrics
from megatron_prolong.evaluation.rows import read_rows
from megatron_prolong.evaluation.task import (
    Inputs,
    Row,
    Scored,
    Task,
    first_of_each,
    shuffled,
    stable_seed,
)

PASSAGES = {4096: 14, 8192: 50, 16384: 130, 32768: 285, 65536: 600, 131072: 1000}
TEMPLATE = (  # "relelvant" is HELMET's
    "You are provided with a list of documents, each indicated by their ID. Rank each document based on their "
    "relevance to the question in descending order from most relelvant to least relevant texts. Include all "
    "documents in the rankings. Write your answer using the unique IDs, with the following format:\n"
    "Ranking: ID3 > ID1 > ID2\n\n{demos}{context}\n\nQuery: {question}"
)


def rerank_tasks(length: int) -> list[Task]:
    """MS MARCO; HELMET has data for 4K to 128K only."""
    if length not in PASSAGES:
        return []
    test_file = f"msmarco/test_reranking_data_k{PASSAGES[length]}_dep3.jsonl"
    demo_file = "msmarco/test_reranking_data_k10_dep3.jsonl"
    task = Task(
        name="msmarco_rerank_psg",
        category="rerank",
        length=length,
        template=TEMPLATE,
        answer_prefix="Ranking:",
        load=_load,
        score=_score,
        max_new_tokens=200,
        metrics=("NDCG@10",),
        test_file=test_file,
        demo_file=demo_file,
        needs=(test_file, demo_file),
        question="qid",
    )
    return [task]


def _load(task: Task, inputs: Inputs) -> list[Row]:
    assert inputs.data is not None
    rows = read_rows(inputs.data / task.test_file)
    demos = read_rows(inputs.data / task.demo_file)
    names = sorted({row["qid"] for row in rows})
    chosen = set(random.Random(inputs.seed).sample(names, min(task.samples(inputs), len(names))))
    rows = [row for row in rows if row["qid"] in chosen]
    cut_offs = [cut for cut in CUT_OFFS if cut <= len(rows[0]["ctxs"])] if rows else []
    if len(demos) > 2 * len(rows):
        asked = {row["qid"] for row in rows}
        demos = [demo for demo in demos if demo["qid"] not in asked]
    return [_fill(row, demos, task.shots, cut_offs) for row in rows]


def _fill(row: Row, pool: list[Row], shots: int, cut_offs: list[int]) -> Row:
    pool = [demo for demo in pool if demo["qid"] != row["qid"]]
    chosen = first_of_each(shuffled(pool, stable_seed(row["qid"])), "qid")[:shots]
    demos = "".join(
        f"{_passages(demo, row)}\n\nQuery: {demo['query']}\nRanking: {_gold(demo)}\n\n" for demo in chosen
    )
    kept = {name: value for name, value in row.items() if name not in ("query", "ctxs")}
    return {
        **kept,
        "context": _passages(row, row),
        "question": row["query"],
        "demos": demos,
        "answer": _gold(row),
        "qrel": [[passage["id"], str(passage["label"])] for passage in row["ctxs"]],
        "cut_offs": cut_offs,
    }


def _passages(shown: Row, asked: Row) -> str:
    """Titles appear when the asked row's passages have them."""
    titled = "title" in asked["ctxs"][0]
    return "\n\n".join(
        f"[ID: {passage['id']}] Document{' (Title: ' + passage['title'] + ')' if titled else ''}: {passage['text']}"
        for passage in shown["ctxs"]
    )


def _gold(row: Row) -> str:
    return " > ".join(
        passage["id"] for passage in sorted(row["ctxs"], key=lambda passage: passage["label"], reverse=True)
    )


def _score(output: str, row: Row) -> Scored:
    ranking = parse_ranking(output)
    relevance = {name: int(label) for name, label in row["qrel"]}
    scores = ranking_metrics(ranking, relevance, row["cut_offs"])
    return Scored({**scores, "num_preds": len(ranking)}, ranking)

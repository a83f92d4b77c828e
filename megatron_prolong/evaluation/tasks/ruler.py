"""RULER's thirteen tasks in HELMET's form: read from HELMET's files, or generated at any length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megatron_prolong.evaluation.backend import encode
from megatron_prolong.evaluation.prompts import chat_tokens, render
from megatron_prolong.evaluation.rows import read_rows
from megatron_prolong.evaluation.synthetic import documents_qa, needles, variables, word_counts
from megatron_prolong.evaluation.task import Inputs, Row, Scored, Task, score_text, shuffled
from megatron_prolong.evaluation.text_metrics import ruler_recall

FOLDERS = {
    "niah_s_1": "niah_single_1",
    "niah_s_2": "niah_single_2",
    "niah_s_3": "niah_single_3",
    "niah_mk_1": "niah_multikey_1",
    "niah_mk_2": "niah_multikey_2",
    "niah_mk_3": "niah_multikey_3",
    "niah_mq": "niah_multiquery",
    "niah_mv": "niah_multivalue",
    "cwe": "cwe",
    "fwe": "fwe",
    "vt": "vt",
    "qa_1": "qa_1",
    "qa_2": "qa_2",
}
RECALL = ("niah_mk_2", "niah_mk_3", "niah_mv")  # these also belong to HELMET's recall category
ANSWER_TOKENS = {"niah_mk_3": 100, "niah_mq": 100, "cwe": 100}  # the others 50
QA_SOURCES = {"qa_1": "ruler_source/squad.json", "qa_2": "ruler_source/hotpotqa.json"}

ONE_NEEDLE = (
    "A special magic {type_needle_v} is hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {type_needle_v} afterwards.\n{context}\nWhat is the special magic {type_needle_v} for {query} "
    "mentioned in the provided text?",
    "The special magic {type_needle_v} for {query} mentioned in the provided text is",
)
MANY_NEEDLES = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} "
    "for {query} mentioned in the provided text?",
    "The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
QUESTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given "
    "documents. Only give me the answer and do not output any other words.\n\nQuestion: {question}",
    "Answer:",
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words.\n{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    "Answer: According to the coded text above, the three most frequently appeared words are:",
)
TEMPLATES = {
    "niah_mv": MANY_NEEDLES,
    "niah_mq": MANY_NEEDLES,
    "vt": ("{example}" + variables.PROBLEM, variables.ANSWER),
    "cwe": ("{example}" + word_counts.COMMON_PROBLEM, word_counts.COMMON_ANSWER),
    "fwe": FREQUENT,
    "qa_1": QUESTION,
    "qa_2": QUESTION,
}


def ruler_task(short_name: str, length: int, category: str = "ruler") -> Task:
    """One task by RULER's short name (niah_s_1 … qa_2). In the recall category HELMET's file name says 2 shots."""
    template, answer_prefix = TEMPLATES.get(short_name, ONE_NEEDLE)
    test_file = f"ruler/{FOLDERS[short_name]}/validation_{length}.jsonl"
    asks_documents = short_name in QA_SOURCES
    needle = needles.KINDS.get(short_name)
    return Task(
        name=f"ruler_{short_name}",
        category=category,
        length=length,
        template=template,
        answer_prefix=answer_prefix,
        load=partial(_load, short_name),
        score=score_text if asks_documents else _score_recall,
        max_new_tokens=ANSWER_TOKENS.get(short_name, 50),
        metrics=("substring_exact_match",) if asks_documents else ("ruler_recall",),
        shots=2 if category == "recall" else 0,
        test_file=test_file,
        needs=(test_file,),
        instead=QA_SOURCES.get(short_name, ""),
        generated=not asks_documents,
        prose=needle is not None and needle.haystack == "prose",
        question="index",
    )


def ruler_tasks(length: int) -> list[Task]:
    """All thirteen."""
    return [ruler_task(name, length) for name in FOLDERS]


def _load(short_name: str, task: Task, inputs: Inputs) -> list[Row]:
    if inputs.data is not None and (inputs.data / task.test_file).exists():
        rows = [_fill(row) for row in read_rows(inputs.data / task.test_file)]
        return shuffled(rows, inputs.seed)[: task.samples(inputs)]
    return [_fill(row) for row in _generate(short_name, task, inputs)]


def _generate(short_name: str, task: Task, inputs: Inputs) -> list[Row]:
    def count_tokens(row: Row) -> int:
        return len(encode(inputs.tokenizer, render(task, _fill(row), chat=False)))

    # RULER reserves 128 tokens for an answer.
    limit = task.length - max(task.max_new_tokens + chat_tokens(inputs.tokenizer), 128)
    count, seed = task.samples(inputs), inputs.seed
    makers: dict[str, Callable[[], list[Row]]] = {
        "vt": lambda: variables.make_rows(count_tokens, limit, count, seed),
        "cwe": lambda: word_counts.make_common_rows(count_tokens, task.length, limit, count, seed),
        "fwe": lambda: word_counts.make_frequent_rows(count_tokens, task.length, limit, count, seed),
    }
    if short_name in makers:
        return makers[short_name]()
    if short_name in QA_SOURCES:
        assert inputs.data is not None
        return documents_qa.make_rows(inputs.data / QA_SOURCES[short_name], count_tokens, limit, count, seed)
    return needles.make_rows(needles.KINDS[short_name], count_tokens, limit, count, seed, inputs.haystack)


def _fill(row: Row) -> Row:
    """The fields of the templates: HELMET's process_example."""
    return {
        **row,
        "question": row.get("query", row.get("question", "")),
        "example": row["example"] + "\n\n" if row.get("example") else "",
        "answer": row.get("answer", row.get("outputs")),
    }


def _score_recall(output: str, row: Row) -> Scored:
    return Scored({"ruler_recall": ruler_recall(output, row["answer"])}, output)

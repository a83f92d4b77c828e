"""JSON key/value recall. The other recall tasks of HELMET are RULER's (`ruler.py`)."""

from __future__ import annotations

from megatron_prolong.evaluation.backend import encode
from megatron_prolong.evaluation.prompts import chat_tokens, render
from megatron_prolong.evaluation.rows import read_rows
from megatron_prolong.evaluation.synthetic import json_kv
from megatron_prolong.evaluation.synthetic.size import largest_fit
from megatron_prolong.evaluation.task import Inputs, Row, Scored, Task, score_text, shuffled

# HELMET's pairs by nominal length; beyond 128K continued in proportion.
PAIRS = {
    4096: 50, 8192: 105, 16384: 220, 32768: 440, 65536: 900, 131072: 1800,
    262144: 3600, 524288: 7200, 1048576: 14400,
}  # fmt: skip
TEMPLATE = (
    "{context}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
    "{demos}Key: {question}"
)


def json_kv_task(length: int) -> Task:
    """JSON KV at any length; generated when HELMET's file is not there, and where no file has that length."""
    test_file = f"json_kv/test_k{PAIRS[length]}_dep6.jsonl" if length in PAIRS else ""
    return Task(
        name="json_kv",
        category="recall",
        length=length,
        template=TEMPLATE,
        answer_prefix="Corresponding value:",
        load=_load,
        score=_score,
        max_new_tokens=100,
        metrics=("substring_exact_match",),
        test_file=test_file,
        needs=(test_file,) if test_file else (),
        generated=True,
    )


def _load(task: Task, inputs: Inputs) -> list[Row]:
    files = task.files(inputs.data)
    rows = read_rows(files[0]) if files else _generate(task, inputs)
    rows = [_with_demos(row, task.shots) for row in rows]
    return shuffled(rows, inputs.seed)[: task.samples(inputs)]


def _generate(task: Task, inputs: Inputs) -> list[Row]:
    """HELMET's number of pairs, or as many as fit by the model's own tokenizer when that is fewer."""

    def count_tokens(num_pairs: int) -> int:
        row = json_kv.make_rows(num_pairs + json_kv.MAX_SHOTS, 1, inputs.seed)[0]
        return len(encode(inputs.tokenizer, render(task, _with_demos(row, task.shots), chat=False)))

    limit = task.length - task.max_new_tokens - chat_tokens(inputs.tokenizer)
    pairs = PAIRS.get(task.length)
    if pairs is None or count_tokens(pairs - json_kv.MAX_SHOTS) > limit:
        pairs = largest_fit(count_tokens, limit, start=16) + json_kv.MAX_SHOTS
    return json_kv.make_rows(pairs, task.samples(inputs), inputs.seed)


def _with_demos(row: Row, shots: int) -> Row:
    demos = "".join(f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in row["demos"][:shots])
    return {**row, "demos": demos, "k": row["num_kvs"]}


def _score(output: str, row: Row) -> Scored:
    return score_text(output, row, prefix="corresponding value:")

"""princeton-nlp/HELMET's own scripts/collect_results.py reads our files and finds the scores that we show.

Needs a checkout of HELMET, named by the environment variable HELMET, and pandas.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helmet_checkout import HELMET, needs_helmet
from samples import write_data
from servers import Server, client
from stand_ins import Parrot, short_documents

from megatron_prolong.evaluation.averages import averages
from megatron_prolong.evaluation.judge import Judge, judge_results
from megatron_prolong.evaluation.results import read_results
from megatron_prolong.evaluation.run import Settings
from megatron_prolong.evaluation.suite import run_suite
from megatron_prolong.evaluation.suites import select
from megatron_prolong.evaluation.task import Inputs

# The script's names for our categories, and of two models that it looks for: one base, one with a chat template.
CATEGORIES = {
    "Recall": "recall", "RAG": "rag", "ICL": "icl", "Cite": "cite", "Re-rank": "rerank", "LongQA": "longqa",
    "Summ": "summ",
}  # fmt: skip
MODELS = {"Llama-3.1-8B": "never", "Llama-3.1-8B-Instruct": "auto"}
JUDGEMENT = 'So: {"fluency": 1, "correctness": 2, "recall": 1, "precision": 2, "sentence_count": 3}'


@needs_helmet
def test_collect_results_reads_ours(
    tokenizer: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    short_documents(monkeypatch)
    server.answer = JUDGEMENT
    inputs = Inputs(write_data(tmp_path / "data"), tokenizer)
    (tmp_path / "configs").symlink_to(HELMET / "configs")
    for model, chat in MODELS.items():
        out = tmp_path / "output" / model
        entails = lambda passage, claim: "fact 1" in passage  # noqa: E731
        run_suite(select("helmet", [8192]), Parrot(tokenizer), inputs, Settings(chat=chat), out, entails)
        judge_results(out, Judge(client(server), "tiny", tmp_path / "cache.jsonl"), HELMET)
    collected = collect(tmp_path)
    assert set(collected) == set(MODELS)
    for model, row in collected.items():
        ours = {one.category: one for one in averages(read_results(tmp_path / "output" / model))}
        assert not any(one.partial for one in ours.values())
        for theirs, category in CATEGORIES.items():
            assert float(row[theirs]) == pytest.approx(ours[category].score, abs=1e-9), (model, category)
        assert float(row["Ours"]) == pytest.approx(ours["mean"].score)
    scores = [float(row[category]) for row in collected.values() for category in CATEGORIES]
    assert len(set(scores)) > 5 and not any(map(math.isnan, scores)), "all alike would prove nothing"


def collect(directory: Path) -> dict[str, dict[str, str]]:
    """The script's table at 8K, by model."""
    done = subprocess.run(
        [sys.executable, str(HELMET / "scripts/collect_results.py")],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("input_max_length,"))
    rows = csv.DictReader(lines[start : lines.index("", start)])
    return {row["model"]: row for row in rows if row["input_max_length"] == "8192"}

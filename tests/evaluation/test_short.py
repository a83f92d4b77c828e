"""lm-evaluation-harness on a checkpoint exported to Hugging Face's format, with a task that needs no network."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import short
from megatron_prolong.evaluation.backend import open_backend
from megatron_prolong.evaluation.published import published
from megatron_prolong.evaluation.short import ShortTask, print_short, run_short

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {
        "question": f"The magic number {n} is",
        "choices": ["the key", "in text", "a b", "mentioned"],
        "label": n % 4,
    }
    for n in range(24)
]
TINY = ShortTask("tiny_choice", 0, "acc,none")


def test_the_harness_scores_an_exported_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="pip install megatron-prolong[eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    exported = tmp_path / "exported"
    to_hf(checkpoint, exported)
    scores = run_short(exported, tmp_path / "out", tasks=(TINY,), task_directory=tmp_path)
    assert scores == {"tiny_choice": pytest.approx(100 * accuracy(checkpoint))}
    assert 0 < scores["tiny_choice"] < 100, "a task that is all right or all wrong would prove nothing"
    written = json.loads((tmp_path / "out" / "short.json").read_text())["args"]
    assert written["lm_eval"] == lm_eval.__version__ and not written["add_bos_token"]
    monkeypatch.setattr(short, "_harness", lambda directory: (None, None, lm_eval.__version__))
    assert run_short(exported, tmp_path / "out", tasks=(TINY,)) == scores, "a finished task is not run again"


def accuracy(checkpoint: Path) -> float:
    """The same questions, asked of the checkpoint before its export."""
    right = 0
    with open_backend(checkpoint) as backend:
        assert backend is not None
        for row in QUESTIONS:
            prompt, *choices = (
                backend.tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (row["question"], *(f" {choice}" for choice in row["choices"]))
            )
            (found,) = backend.continuation_logprobs([(prompt, choices)])  # without BOS
            right += found.index(max(found)) == row["label"]
    return right / len(QUESTIONS)


def test_what_is_scored_already_is_not_asked_again_unless_it_was_of_something_else(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.append((options["tasks"], options["num_fewshot"], options["limit"]))
        assert options["model_args"]["add_bos_token"] is False, "as in the published scores"
        return {"results": {"tiny_choice": {"acc,none": len(asked) / 8}}}

    monkeypatch.setattr(short, "_harness", lambda directory: (evaluate, None, "0.4.9"))
    ask = partial(run_short, hf_directory, tmp_path, tasks=(ShortTask("tiny_choice", 3, "acc,none"),))
    assert ask(samples=9) == ask(samples=9) == {"tiny_choice": 12.5}
    assert ask() == {"tiny_choice": 25.0}
    assert ask(samples=9) == {"tiny_choice": 12.5}, "a smoke test neither replaces the whole nor is replaced"
    (tmp_path / "short.json").write_text("{}")  # as another version may have left it
    assert ask() == {"tiny_choice": 37.5}
    monkeypatch.setattr(short, "_harness", lambda directory: (evaluate, None, "0.4.13"))
    assert ask() == {"tiny_choice": 50.0}, "another version may ask otherwise"
    assert asked == [(["tiny_choice"], 3, limit) for limit in (9, None, None, None)]


def test_models_stand_beside_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    print_short({"before": {"mmlu": 66.12}, "after": {"mmlu": 64.96, "tiny_choice": 12.5}})
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for cells in (re.findall(r"[\w.]+", line) for line in lines) if cells}
    assert rows["mmlu"][:2] == ["66.1", "65.0"] and len(rows["mmlu"]) == 2 + len(published("short", 0))
    assert rows["tiny_choice"] == ["12.5"]


def test_all_models_are_looked_at_before_the_first_is_measured(
    hf_directory: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not exported, more ranks than lm-eval is asked on, and another model's scores in its folder."""
    monkeypatch.setattr(short, "run_short", lambda *_, **__: pytest.fail())
    (tmp_path / "tiny").mkdir()
    arguments = {"model_name_or_path": "other/tiny", "model_identity": "x"}
    (tmp_path / "tiny" / "short.json").write_text(json.dumps({"args": arguments, "scores": {"mmlu": 1.0}}))

    def refusal(*models: object) -> str:
        command = ["eval", "run", *map(str, models), "--suite", "short", "--out", str(tmp_path)]
        found = CliRunner().invoke(app, command).exception
        assert isinstance(found, UserError)
        return str(found)

    assert "not a Hugging Face model" in refusal(f"one={hf_directory}", "--compare", f"two={checkpoint}")
    assert "holds results of another model" in refusal(f"one={hf_directory}", "--compare", hf_directory)
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    assert "runs in one process" in refusal(f"one={hf_directory}")


def test_the_command_runs_the_tasks_asked_for_and_refuses_what_it_cannot_use(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.extend(options["tasks"])
        return {"results": {"gsm8k": {"exact_match,strict-match": 0.5}}}

    monkeypatch.setattr(short, "_harness", lambda directory: (evaluate, None, "0.4.13"))
    command = ["eval", "run", str(hf_directory), "--suite", "short", "--out", str(tmp_path)]
    for more in ([], [], ["--overwrite"]):
        assert CliRunner().invoke(app, [*command, "--tasks", "gsm8k", *more]).exit_code == 0
    assert asked == ["gsm8k", "gsm8k"]
    for refused, why in (
        ("--chat=auto", "no use for --chat"),
        ("--batch-size=4", "no use for --batch-size"),
        ("--tasks=x", "no task x"),
    ):
        assert why in str(CliRunner().invoke(app, [*command, refused]).exception)

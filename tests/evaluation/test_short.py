"""lm-evaluation-harness on a checkpoint exported to Hugging Face's format, with a task that needs no network."""

from __future__ import annotations

import errno
import json
import re
from collections import ChainMap
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from own_tasks import write_tasks
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.convert.to_hf import to_hf
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import short
from megatron_prolong.evaluation.published import published
from megatron_prolong.evaluation.short import ShortTask, print_short, run_short, select_short

CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""
ANSWER = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["x"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXT = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{choices | join(' ')}} {{question}}"
metric_list: [{metric: bits_per_byte}]
"""
QUESTIONS = [
    {
        "question": f"The magic number {n} is" if n else "",
        "choices": ["the key", "in text", "a b", "mentioned"],
        "label": n % 4,
    }
    for n in range(24)
]
TINY = (
    ShortTask("tiny_choice", 0, "acc,none"),
    ShortTask("tiny_answer", 1, "exact_match,none"),
    ShortTask("tiny_text", 0, "bits_per_byte,none"),
)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of tasks that need no network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path, {"tiny_choice": CHOICE, "tiny_answer": ANSWER, "tiny_text": TEXT}, QUESTIONS)
    return tmp_path


def test_a_checkpoint_in_place_answers_as_its_export_does(
    checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export is asked through the harness's own model of transformers, one question at a time."""
    exported = tmp_path / "exported"
    to_hf(checkpoint, exported)
    answers: list[dict[str, Any]] = []

    def keeping(**options: Any) -> Any:
        found = simple_evaluate(**options)
        answers.append(found["samples"])
        return found

    monkeypatch.setattr(short, "simple_evaluate", keeping)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_path=str(tasks)))
    scores = run_short(exported, tmp_path / "theirs", tasks=TINY)
    assert run_short(checkpoint, tmp_path / "ours", tasks=TINY, batch_size=5) == pytest.approx(
        scores, abs=1e-2
    )
    assert 0 < scores["tiny_choice"] < 100, "a task that is all right or all wrong would prove nothing"
    theirs, ours = ChainMap(*answers[: len(TINY)]), ChainMap(*answers[len(TINY) :])
    logprobs = [
        [float(response[0]) for sample in found["tiny_choice"] for response in sample["filtered_resps"]]
        for found in (theirs, ours)
    ]
    assert len(logprobs[0]) == 4 * len(QUESTIONS) and len(set(logprobs[0])) > len(QUESTIONS)
    assert logprobs[1] == pytest.approx(logprobs[0], abs=1e-3)  # fp32, sums in another order
    texts = [[sample["resps"] for sample in found["tiny_answer"]] for found in (theirs, ours)]
    assert texts[1] == texts[0] and len(set(map(str, texts[0]))) > 3


def test_what_is_scored_already_is_not_asked_again_unless_it_was_of_something_else(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.append((options["tasks"], options["num_fewshot"], options["limit"]))
        assert options["model_args"]["add_bos_token"] is False, "as in the published scores"
        return {"results": {"tiny_choice": {"acc,none": len(asked) / 8}}}

    monkeypatch.setattr(short, "simple_evaluate", evaluate)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: None)
    ask = partial(run_short, hf_directory, tmp_path, tasks=(ShortTask("tiny_choice", 3, "acc,none"),))
    assert ask(samples=9) == ask(samples=9) == {"tiny_choice": 12.5}
    assert ask() == {"tiny_choice": 25.0}
    assert ask(samples=9) == {"tiny_choice": 12.5}, "a smoke test neither replaces the whole nor is replaced"
    (tmp_path / "short.json").write_text("{}")  # as another version may have left it
    assert ask() == {"tiny_choice": 37.5}
    monkeypatch.setattr(short, "version", lambda _: "another")
    assert ask() == {"tiny_choice": 50.0}, "another version may ask otherwise"
    assert asked == [(["tiny_choice"], 3, limit) for limit in (9, None, None, None)]
    content = json.loads((tmp_path / "short.json").read_text())
    for scores in ({}, {"scores": 50.0}, {"scores": {"other": "high"}}):  # as a hand may have left it
        (tmp_path / "short.json").write_text(json.dumps({"args": content["args"], **scores}))
        with pytest.raises(
            UserError, match=r"short\.json: not a whole result .*; delete it, and run the task"
        ):
            ask()
    (tmp_path / "short.json").write_text(json.dumps({**content, "scores": {"tiny_choice": None}}))
    assert isnan(ask()["tiny_choice"]), "as JSON has it"


def test_shots_and_metrics_are_those_of_the_old_leaderboard() -> None:
    """Others give other scores, beside which the published ones would be no comparison."""
    assert {task.name: (task.shots, task.metric.partition(",")[0]) for task in short.TASKS} == {
        "hellaswag": (10, "acc_norm"),
        "mmlu": (5, "acc"),
        "arc_challenge": (25, "acc_norm"),
        "winogrande": (5, "acc"),
        "gsm8k": (5, "exact_match"),
    }


def test_data_that_cannot_be_fetched_is_one_message(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(**options: Any) -> dict[str, Any]:
        if options["tasks"] == ["mmlu"]:
            raise ConnectionError("Couldn't reach 'cais/mmlu' on the Hub")
        return {"results": {"hellaswag": {"acc_norm,none": 0.25}}}

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", evaluate)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: None)
    with pytest.raises(UserError, match=r"mmlu: Couldn't reach 'cais/mmlu' .*HF_HOME"):
        run_short(hf_directory, tmp_path)
    assert json.loads((tmp_path / "short.json").read_text())["scores"] == {"hellaswag": 25.0}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", full)
    with pytest.raises(OSError, match="No space left"):  # which no fetching helps
        run_short(hf_directory, tmp_path)


def test_models_stand_beside_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    print_short({"before": {"mmlu": 66.12}, "after": {"mmlu": 64.96, "tiny_choice": 12.5}})
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for cells in (re.findall(r"[\w.]+", line) for line in lines) if cells}
    assert rows["mmlu"][:2] == ["66.1", "65.0"] and len(rows["mmlu"]) == 2 + len(published("short", 0))
    assert rows["tiny_choice"] == ["12.5"]


def test_all_models_are_looked_at_before_the_first_is_measured(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not there, and another model's scores in its folder."""
    monkeypatch.setattr(short, "run_short", lambda *_, **__: pytest.fail())
    (tmp_path / "tiny").mkdir()
    arguments = {"model_name_or_path": "other/tiny", "model_identity": "x"}
    (tmp_path / "tiny" / "short.json").write_text(json.dumps({"args": arguments, "scores": {"mmlu": 1.0}}))

    def refusal(*models: object) -> str:
        command = ["eval", "run", *map(str, models), "--suite", "short", "--out", str(tmp_path)]
        found = CliRunner().invoke(app, command).exception
        assert isinstance(found, UserError)
        return str(found)

    assert "gone: no such directory" in refusal(f"one={hf_directory}", "--compare", tmp_path / "gone")
    assert "holds results of another model" in refusal(f"one={hf_directory}", "--compare", hf_directory)


def test_the_command_runs_the_tasks_asked_for_and_refuses_what_it_cannot_use(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def evaluate(**options: Any) -> dict[str, Any]:
        asked.extend(options["tasks"])
        return {"results": {"gsm8k": {"exact_match,strict-match": 0.5}}}

    monkeypatch.setattr(short, "simple_evaluate", evaluate)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: None)
    command = ["eval", "run", str(hf_directory), "--suite", "short", "--out", str(tmp_path)]
    for more in ([], [], ["--overwrite"]):
        assert CliRunner().invoke(app, [*command, "--tasks", "gsm8k", *more]).exit_code == 0
    assert asked == ["gsm8k", "gsm8k"]
    assert select_short([]) == short.TASKS
    for refused, why in (
        ("--chat=auto", "no use for --chat"),
        ("--cp=2", "no use for --cp"),
        ("--tasks=x", "no task x"),
    ):
        assert why in str(CliRunner().invoke(app, [*command, refused]).exception)

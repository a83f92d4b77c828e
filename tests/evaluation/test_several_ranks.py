"""`prolong eval` under torchrun: several models one after the other, and errors said once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from own_tasks import write_tasks
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError


def eval_on_two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "megatron_prolong", "eval", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_a_second_model_is_measured_as_the_first(checkpoint: Path, tmp_path: Path) -> None:
    """The ranks meet once: torchrun's store still held the addresses of the first meeting at the second."""
    once = ["--lengths", 256, "--depths", 50, "--trials", 1, "--out", tmp_path]
    found = eval_on_two_ranks("needle", f"one={checkpoint}", "--compare", f"two={checkpoint}", *once)
    assert found.returncode == 0, found.stderr
    models = json.loads((tmp_path / "needle.json").read_text())["models"]
    assert models["one"] == models["two"] and len(models["one"]) == 1


@pytest.mark.slow
def test_ranks_answer_the_harness_together(checkpoint: Path, tmp_path: Path) -> None:
    """Split by tensor parallelism, and with prompts shared (--cp 2), as one process does."""
    rows = [{"question": f"The key {n}" * 100, "answer": "in text"} for n in range(4)]
    words = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    perplexity = "output_type: loglikelihood\nmetric_list: [{metric: perplexity}, {metric: acc}]\n"
    write_tasks(tmp_path, {"own": words + perplexity}, rows)
    asked = ["lm-eval", f"tiny={checkpoint}", "--tasks", "own", "--include", tmp_path, "--out"]
    assert CliRunner().invoke(app, ["eval", *map(str, asked), str(tmp_path / "one")]).exit_code == 0
    found = eval_on_two_ranks(*asked, tmp_path / "tp"), eval_on_two_ranks(*asked, tmp_path / "cp", "--cp", 2)
    assert all(one.returncode == 0 for one in found), found
    one, tp, cp = (
        json.loads((tmp_path / name / "tiny" / "lm_eval.json").read_text())["scores"]["own"]["own"]
        for name in ("one", "tp", "cp")
    )
    assert tp == pytest.approx(one, rel=1e-3) and cp == pytest.approx(
        one, rel=1e-3
    )  # fp32, sums in another order


def test_what_every_rank_meets_is_said_once(hf_directory: Path, tmp_path: Path) -> None:
    found = eval_on_two_ranks(
        "run", hf_directory, "--suite", "synthetic", "--lengths", 512, "--out", tmp_path
    )
    assert found.returncode != 0 and found.stderr.count("the hf backend runs in one process") == 1


def test_all_models_are_looked_at_before_the_first_is_measured(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prolong.evaluation.backend.open_backend", pytest.fail)
    for command in (["needle"], ["run", "--suite", "synthetic"]):
        arguments = [*command, str(hf_directory), "--compare", str(tmp_path / "gone"), "--out", str(tmp_path)]
        found = CliRunner().invoke(app, ["eval", *arguments, "--lengths", "512"])
        assert isinstance(found.exception, UserError) and "gone: no such directory" in str(found.exception)


def test_a_task_without_room_for_its_question_is_told_before_a_model_is_opened(
    hf_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prolong.evaluation.backend.open_backend", pytest.fail)
    command = ["eval", "run", str(hf_directory), "--suite", "synthetic", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*command, "--lengths", "1K,512"])
    assert isinstance(found.exception, UserError), found.output
    assert str(found.exception).startswith("json_kv at a length of 512 tokens: ")
    command[-1] = "/proc/out"
    found = CliRunner().invoke(app, [*command, "--lengths", "1K", "--tasks", "json_kv"])
    assert isinstance(found.exception, OSError), "a place that cannot be written in"

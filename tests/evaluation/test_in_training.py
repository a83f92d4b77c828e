"""`evaluation:` in a recipe: training pauses, measures its checkpoint, logs the scores, and goes on unchanged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation import in_training
from megatron_prolong.evaluation.documents import Passage
from megatron_prolong.evaluation.in_training import ATTEMPT, CheckpointEvaluation, _read
from megatron_prolong.evaluation.megatron import open_megatron
from megatron_prolong.recipe.schema import EvaluationSpec
from megatron_prolong.runtime import passing, strict_json
from megatron_prolong.runtime.watchdog import Watchdog

RECIPE = """\
name: tiny
run_dir: {run_dir}
model:
  init: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, max_length: 64}}
  tokenizer: {tokenizer}
precision: fp32
recompute: none
stages:
  - {{name: short, sequence_length: 64, batch_tokens: 256, steps: 5, lr: 1e-2, mixture: mock}}
{evaluation}
"""
EVALUATION = "evaluation: {every: 2, lengths: [1K, 2K], samples: 2, tasks: [niah_s_1]}"
NAMES = {"ruler_niah_s_1/1024", "ruler_niah_s_1/2048"}


class Runs:
    """Runs of one recipe in real processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def recipe(self, run: str, evaluation: str) -> Path:
        path = self.root / f"{run}.yaml"
        text = RECIPE.format(
            run_dir=self.root / run, tokenizer=self.root / "tokenizer", evaluation=evaluation
        )
        path.write_text(text)
        return path

    def start(self, run: str, *arguments: str, evaluation: str = EVALUATION) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megatron_prolong", "train", str(self.recipe(run, evaluation))]
        return subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def train(self, run: str, *arguments: str, code: int = 0, evaluation: str = EVALUATION) -> str:
        process = self.start(run, *arguments, evaluation=evaluation)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def lines(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines(run) if "loss" in line}

    def scores(self, run: str) -> dict[int, dict[str, float]]:
        return {line["step"]: line["scores"] for line in self.lines(run) if line.get("event") == "evaluation"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Runs:
    root = tmp_path_factory.mktemp("evaluated")
    tokenizer.save_pretrained(root / "tokenizer")
    return Runs(root)


@pytest.fixture(scope="module")
def evaluated(runs: Runs) -> Runs:
    runs.train("evaluated")
    return runs


def test_scores_of_every_pause_are_in_the_logs_and_the_report(evaluated: Runs) -> None:
    scores = evaluated.scores("evaluated")
    assert list(scores) == [2, 4, 5]
    assert all(found.keys() == NAMES for found in scores.values())
    events = EventAccumulator(str(evaluated.root / "evaluated/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("short/evaluation/ruler_niah_s_1/1024")] == [2, 4, 5]
    report = CliRunner().invoke(app, ["report", str(evaluated.root / "evaluated")])
    assert report.exit_code == 0
    page = (evaluated.root / "evaluated/report.html").read_text()
    assert all(name in page for name in NAMES)
    folder = evaluated.root / "evaluated/evaluation/short"
    compared = CliRunner().invoke(
        app, ["eval", "compare", *(f"{step}={folder}/step_{step:08d}" for step in (2, 4, 5))]
    )
    assert compared.exit_code == 0, compared.output


def test_the_pauses_change_no_loss(evaluated: Runs) -> None:
    evaluated.train("undisturbed", evaluation="")
    assert evaluated.losses("undisturbed") == evaluated.losses("evaluated")


def test_only_what_is_not_measured_yet_is_measured(evaluated: Runs) -> None:
    before = evaluated.lines("evaluated")
    shutil.rmtree(evaluated.root / "evaluated/evaluation/short/step_00000005")
    evaluated.train("evaluated")
    (new,) = evaluated.lines("evaluated")[len(before) :]
    assert (new["event"], new["step"]) == ("evaluation", 5)


def test_scores_of_other_questions_do_not_count(tmp_path: Path) -> None:
    about = {"model_identity": "x", "samples": 2, "tasks": ["ruler_vt/1024"]}
    path = tmp_path / "scores.json"
    assert not _read(path, about)
    path.write_text(json.dumps({**about, "scores": {"ruler_vt/1024": 1.0}}))
    assert _read(path, about)["scores"] == {"ruler_vt/1024": 1.0}
    for changed in ({"model_identity": "y"}, {"samples": 3}, {"tasks": ["ruler_vt/1024", "ruler_vt/2048"]}):
        assert not _read(path, {**about, **changed})
    for damaged in ("[1]", '{"samples"'):
        path.write_text(damaged)
        assert not _read(path, about)


def test_another_length_of_the_same_documents_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "from_main", lambda value: value)
    model = Mock(
        token_logprobs=lambda sequences: [np.full(len(ids), -len(ids)) for ids in sequences], batch_size=2
    )
    monkeypatch.setattr(in_training, "open_megatron", lambda *_, **__: nullcontext(model))
    found = []
    for lengths in ((64,), (128,), (16, 128)):
        spec = EvaluationSpec(lengths=lengths, suite="none", held_out=("a.txt",))
        passages = [Passage("a.txt", np.arange(max(lengths)))]
        measure = CheckpointEvaluation(spec, [], passages, tmp_path, Mock(), lambda: False)
        found.append(measure(tmp_path / "stage" / "step"))
    assert found == [{"held_out_loss/64": 64}, {"held_out_loss/128": 128}, {}]


@pytest.mark.parametrize(("midway", "size", "ends"), [(False, 2, False), (True, 1, False), (True, 2, True)])
def test_a_defect_of_an_evaluation_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, midway: bool, size: int, ends: bool
) -> None:
    """But where other ranks wait in a call of the model, only its end tells them."""
    monkeypatch.setattr(in_training, "from_main", lambda value: value)
    failing = Mock(side_effect=ValueError("a defect"))
    model = Mock(token_logprobs=failing, inference=Mock(midway=midway), batch_size=1)
    watched = []

    def opened(*_: object, watchdog: Watchdog, **__: object) -> AbstractContextManager[Mock]:
        watched.append(watchdog.where)
        return nullcontext(model)

    monkeypatch.setattr(in_training, "open_megatron", opened)
    spec = EvaluationSpec(lengths=(64,), suite="none", held_out=("a.txt",))
    world = Mock(rank=0, size=size)
    measure = CheckpointEvaluation(
        spec, [], [Passage("a.txt", np.arange(64))], tmp_path, world, lambda: False
    )
    where = tmp_path / "stage" / "step"
    for _ in range(2):
        with pytest.raises(ValueError, match="a defect") if ends else nullcontext():
            assert measure(where) == {}
        said = capsys.readouterr().err
        assert ("not measured, training goes on: " in said and "a defect" in said) is not ends
        assert (where / ATTEMPT).exists() is ends
    assert watched == [f"the evaluation {where}"] * 2
    assert measure(where) == {}, "a third start trains on"
    assert len(watched) == 2 + (not ends)
    said = capsys.readouterr().err
    again = "2 starts have ended in it; while this is its stage's newest checkpoint, a start without"
    assert (again in said) is ends
    if ends:
        with pytest.raises(ValueError, match="a defect"):
            replace(measure, spec=spec.model_copy(update={"samples": 1}))(where)


@pytest.mark.parametrize(("number", "tries"), [(errno.ESTALE, 2), (errno.EACCES, 1)])
def test_a_fault_of_the_file_server_that_passes_leaves_no_evaluation_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tries: int
) -> None:
    monkeypatch.setattr(in_training, "from_main", lambda value: value)
    monkeypatch.setattr(passing, "WAITS_SECONDS", (0.0,))
    tried: list[Path] = []

    def write_json(file: Path, content: object) -> None:
        tried.append(file)
        if len(tried) == 1:
            raise OSError(number, "the file server")
        strict_json.write_json(file, content)

    monkeypatch.setattr(in_training, "write_json", write_json)
    model = Mock(token_logprobs=lambda sequences: [np.zeros(63) for _ in sequences], batch_size=1)
    monkeypatch.setattr(in_training, "open_megatron", lambda *_, **__: nullcontext(model))
    spec = EvaluationSpec(lengths=(64,), suite="none", held_out=("a.txt",))
    passages = [Passage("a.txt", np.arange(64))]
    found = CheckpointEvaluation(spec, [], passages, tmp_path, Mock(), lambda: False)(tmp_path / "a" / "b")
    assert found == ({"held_out_loss/64": 0.0} if tries == 2 else {})
    assert [file.name for file in tried] == ([ATTEMPT, ATTEMPT, "scores.json"] if tries == 2 else [ATTEMPT])


def test_every_pass_of_the_model_feeds_the_watchdog(evaluated: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    monkeypatch.setattr(Watchdog, "feed", lambda self, step=None: fed.append(step))
    checkpoint = evaluated.root / "evaluated/short/step_00000005"
    with open_megatron(checkpoint, watchdog=Watchdog(rank=0)) as backend:
        assert backend is not None
        fed.clear()
        backend.token_logprobs([[1, 2, 3]])
        assert fed


def test_the_loss_of_held_out_documents_is_that_of_eval_perplexity(runs: Runs) -> None:
    held_out = runs.root / "held_out"
    held_out.mkdir()
    (held_out / "a.txt").write_text("The special magic number is 7. " * 60)
    (held_out / "b.md").write_text("The key is mentioned in the text. " * 60)
    of_text = f"evaluation: {{every: 3, lengths: [64, 128], samples: 2, suite: none, held_out: [{held_out}]}}"
    output = runs.train("held", evaluation=of_text)
    scores = runs.scores("held")
    assert list(scores) == [3, 5] and all(found.keys() == {"held_out_loss/128"} for found in scores.values())
    assert f"short 5 evaluation: held_out_loss/128 {scores[5]['held_out_loss/128']:.4g}" in output
    command = [
        "eval",
        "perplexity",
        str(runs.root / "held/short"),
        "--data",
        str(held_out),
        "--lengths",
        "128",
    ]
    assert CliRunner().invoke(app, [*command, "--out", str(runs.root / "measured")]).exit_code == 0
    found = json.loads((runs.root / "measured/perplexity.json").read_text())["models"]["short"]["by_position"]
    assert [bucket["end"] for bucket in found] == [128]
    assert scores[5]["held_out_loss/128"] == pytest.approx(found[0]["loss"], abs=1e-5)
    assert runs.train("held", evaluation=of_text).count("evaluation") == 0
    output = runs.train("held", evaluation=of_text.replace("128", "64K"), code=2)
    assert "no document of 65,536 tokens, the longest has" in output
    check = ["recipe", "check", str(runs.recipe("held", of_text.replace("held_out]", "gone]")))]
    assert "gone: no such file or directory" in str(CliRunner().invoke(app, check).exception)


@pytest.mark.slow
def test_two_ranks_measure_the_same(evaluated: Runs) -> None:
    """Trained on one rank; measured by two, each with half of the model."""
    shutil.copytree(evaluated.root / "evaluated", evaluated.root / "pair")
    shutil.rmtree(evaluated.root / "pair/evaluation")
    (evaluated.root / "pair/metrics.jsonl").unlink()
    (evaluated.root / "pair/recipe.yaml").unlink()
    evaluated.train("pair", "layout.tp=2", "--processes", "2")
    assert evaluated.scores("pair") == {5: evaluated.scores("evaluated")[5]}
    (one,) = (evaluated.root / "evaluated/evaluation/short/step_00000005").glob("*_in2048_*.json")
    two = evaluated.root / "pair/evaluation/short/step_00000005" / one.name
    outputs = [[item["output"] for item in json.loads(path.read_text())["data"]] for path in (one, two)]
    assert outputs[0] == outputs[1] and any(outputs[0])


@pytest.mark.slow
def test_asked_to_stop_while_evaluating_it_goes_on_later(runs: Runs) -> None:
    long = "evaluation: {lengths: [2K], samples: 400, tasks: [niah_s_1]}"
    process = runs.start("stopped", evaluation=long)
    partial = runs.root / "stopped/evaluation/short/step_00000005"
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.partial.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped while evaluating step 5" in output
    assert list(partial.glob("*.partial.jsonl")) and not runs.scores("stopped")


def test_an_evaluation_that_cannot_be_done_stops_no_training(runs: Runs) -> None:
    cramped = "evaluation: {lengths: [144], samples: 1, tasks: [niah_s_1]}"
    checked = CliRunner().invoke(app, ["train", str(runs.recipe("cramped", cramped)), "--check"])
    assert isinstance(checked.exception, UserError) and "144" in str(checked.exception)
    output = runs.train("cramped", evaluation=cramped)
    assert "not measured, training goes on: " in output and f"done: {runs.root}/cramped/short" in output
    assert runs.scores("cramped") == {}


def test_missing_data_is_found_before_training(runs: Runs) -> None:
    recipe = runs.recipe("missing", "evaluation: {suite: helmet, tasks: [kilt_nq]}")
    checked = CliRunner().invoke(app, ["train", str(recipe), "--check"])
    assert isinstance(checked.exception, UserError) and "no data for kilt_nq" in str(checked.exception)

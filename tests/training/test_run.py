"""The chain of stages: learning, resuming bit for bit, changed recipes, changed layouts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_prolong.cli import train
from megatron_prolong.cli.main import app
from megatron_prolong.data import mixture
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.load import load_recipe
from megatron_prolong.report.history import read_run
from megatron_prolong.runtime.lock import DirectoryLock
from megatron_prolong.training.replay import parse_step


def test_a_run_learns_and_walks_its_stages(workspace, undisturbed):
    expected = [("short", n) for n in range(1, 7)] + [("long", n) for n in range(1, 5)]
    assert list(undisturbed) == expected
    assert undisturbed["short", 1] == pytest.approx(4.6, abs=0.1)  # ln 100: nothing learned yet
    assert undisturbed["long", 4] < undisturbed["short", 1] - 0.2
    manifest = json.loads((workspace.root / "undisturbed/long/step_00000004/prolong.json").read_text())
    assert manifest["shape"]["rope_base"] == 1e5
    assert manifest["training"]["step"] == 4 and manifest["training"]["tokens"] == 4 * 256
    lines = [*map(json.loads, (workspace.root / "undisturbed/metrics.jsonl").read_text().splitlines())]
    assert all(line["balance"] is None for line in lines if "loss" in line), "a rank alone waits for none"
    rates = [record["lr"] for record in lines if record.get("stage") == "short" and "lr" in record]
    assert rates[0] == 1e-2 and rates[-1] == pytest.approx(1e-3)  # one step of warmup; a tenth on the last
    kept = sorted(path.name for path in (workspace.root / "undisturbed/short").glob("step_*"))
    assert kept == ["step_00000003", "step_00000006"]
    recipe = (workspace.root / "undisturbed/recipe.yaml").read_text()
    assert (workspace.root / "undisturbed/short/step_00000003/recipe.yaml").read_text() == recipe


@pytest.mark.parametrize("stage, step", [("short", 3), ("short", 6), ("long", 3)])
def test_resuming_repeats_the_undisturbed_run_bit_for_bit(workspace, undisturbed, stage, step):
    """As if the process had died just before its next checkpoint: everything after `step` is gone."""
    run = f"resumed-{stage}-{step}"
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / run)
    for directory in [*(root / run / "long").glob("step_*"), *(root / run / "short").glob("step_*")]:
        later_stage = directory.parent.name == "long" and stage == "short"
        if later_stage or (directory.parent.name == stage and int(directory.name[5:]) > step):
            shutil.rmtree(directory)
    if stage == "short":
        shutil.rmtree(root / run / "long")
    (root / run / stage / "latest").write_text(f"step_{step:08d}\n")
    (root / run / "metrics.jsonl").unlink()
    (root / run / "recipe.yaml").unlink()
    workspace.train(run)
    resumed = workspace.losses(run)
    assert resumed, "nothing was trained"
    assert resumed == {key: undisturbed[key] for key in resumed}
    assert next(iter(resumed)) == ((stage, step + 1) if step != 6 else ("long", 1))


def test_a_deterministic_run_uses_only_deterministic_kernels(workspace, undisturbed):
    """Those of a CPU are so by themselves: what the switch adds changes no bit of the losses."""
    workspace.train("steady", "deterministic=true")
    assert workspace.losses("steady") == undisturbed
    replaces_a_kernel = """
import torch
from megatron_prolong.cli.main import run
from megatron_prolong.training.prepare import StageRun

StageRun.update = lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
run()
"""
    command = [sys.executable, "-c", replaces_a_kernel, "train", str(workspace.recipe("unsteady"))]
    refused = subprocess.run([*command, "deterministic=true"], capture_output=True, text=True)
    assert "put_ does not have a deterministic implementation" in refused.stderr, refused.stderr


def test_a_run_goes_back_and_passes_steps_over(workspace, undisturbed):
    """What one does after a loss spike: an older checkpoint, and not the same batches again."""
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "past")
    shutil.rmtree(root / "past/long")
    (root / "past/short/latest").write_text("step_00000003\n")
    output = workspace.train("past", "stage.short.skip_steps=4-5", "stage.long.skip_steps=4")
    assert "short 4/6  skipped" in output and "short 5/6  skipped" in output and "long 4/4  skipped" in output
    losses = workspace.losses("past")
    assert losses["short", 6] != undisturbed["short", 6]  # of the same batch, by weights that saw less
    training = json.loads((root / "past/short/step_00000006/prolong.json").read_text())["training"]
    assert (training["step"], training["skipped"], training["tokens"]) == (6, 2, 6 * 256)
    history = read_run(root / "past")
    assert [step for step, _ in history.stages[0].curve("loss")] == [1, 2, 3, 6]
    assert history.done and history.stages[1].last("loss") == losses["long", 3]


def test_a_finished_run_trains_nothing_more(workspace, undisturbed):
    before = (workspace.root / "undisturbed/metrics.jsonl").read_text()
    assert "done:" in workspace.train("undisturbed")
    assert (workspace.root / "undisturbed/metrics.jsonl").read_text() == before


def test_carrying_the_optimizer_matters(workspace, undisturbed):
    """Without Adam's moments the first update of the second stage is another one; the first loss is the same."""
    workspace.train("forgetful", "stage.long.carry.optimizer=false")
    losses = workspace.losses("forgetful")
    assert losses["long", 1] == undisturbed["long", 1]
    assert losses["long", 2] != undisturbed["long", 2]


def test_changes_that_would_corrupt_a_begun_stage_are_refused(workspace, undisturbed):
    for check in ([], ["--check"]):
        overrides = ("stage.short.seed=7", "stage.long.lr=5e-3")
        output = workspace.train("undisturbed", *overrides, *check, code=2)
        assert "stage.short.seed: 42 → 7" in output and "stage.long.lr" in output


def test_data_that_a_later_stage_lacks_is_told_at_the_start(workspace, undisturbed):
    """But for a finished stage's, which may have been deleted."""
    workspace.write_data("half")
    (shard,) = (workspace.root / "half").glob("*.mds")
    shard.write_bytes(shard.read_bytes()[:-1])
    half = f"{{{workspace.root}/half: 1.0}}"
    for check in ([], ["--check"]):
        output = workspace.train("lacking", f"stage.long.mixture={half}", *check, code=2)
        assert f"{workspace.root}/half: 1 of its 1 shards are missing, or have another size" in output
        assert "short 1/6" not in output
    shutil.copytree(workspace.root / "undisturbed", workspace.root / "deleted")
    assert "done:" in workspace.train("deleted", f"stage.short.mixture={half}", f"stage.long.mixture={half}")


def test_data_that_is_slow_to_read_is_warned_of_at_the_start(workspace, monkeypatch):
    monkeypatch.setattr(mixture, "is_unpacked_by_all", lambda shard: True)
    checked = CliRunner().invoke(app, ["train", str(workspace.recipe("slow")), "--check"])
    assert "ready for 1 rank" in checked.output
    assert checked.stderr.count(f"warning: {workspace.root}/data: its shards are compressed") == 1


def test_a_check_tells_what_changed(workspace, undisturbed):
    output = workspace.train("undisturbed", "optimizer.clip=0.5", "--check")
    assert "changed since the last start: optimizer.clip: 1.0 → 0.5\n" in output and "ready for 1" in output


def test_the_recipe_of_a_run_that_has_moved_does_not_begin_it_anew(workspace, undisturbed):
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "moved-run")
    recipe = root / "moved-run" / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace(f"{root}/undisturbed", f"{root}/where-it-was"))
    refused = CliRunner().invoke(app, ["train", str(recipe), "--check"]).exception
    assert f"this run is in {root}/moved-run now: add run_dir={root}/moved-run" in str(refused)
    for elsewhere in ("moved-run", "another"):
        checked = CliRunner().invoke(app, ["train", str(recipe), f"run_dir={root}/{elsewhere}", "--check"])
        assert "ready for 1 rank" in checked.output


def test_the_status_of_a_run_that_has_moved_is_its_own(workspace, undisturbed):
    """recipe.yaml still names the place where the run was."""
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "copied")
    shutil.rmtree(root / "copied/long")
    shown = CliRunner().invoke(app, ["status", str(root / "copied")]).output
    assert "copied/short/step_00000006" in shown and "waiting" in shown and "undisturbed" not in shown


def test_a_run_keeps_what_it_needs_of_its_model(workspace, undisturbed):
    """The tokenizer is the one that the recipe names, and the model may go once it was read."""
    root = workspace.root
    model = root / "model"
    checkpoint = str(root / "undisturbed/short")
    assert CliRunner().invoke(app, ["convert", "to-hf", checkpoint, str(model)]).exit_code == 0
    (model / "tokenizer.json").unlink()
    path, steps = f"model={{path: {model}, tokenizer: {root}/tokenizer}}", "stage.long.steps=1"
    workspace.train("kept", path, steps)
    saved = root / "kept/long/step_00000001/hf"
    assert (saved / "tokenizer.json").read_bytes() == (root / "tokenizer/tokenizer.json").read_bytes()
    assert json.loads((saved / "config.json").read_text())["hidden_size"] == 32
    shutil.rmtree(model)
    checked = CliRunner().invoke(app, ["train", str(workspace.recipe("kept")), path, steps, "--check"])
    assert "ready for 1 rank" in checked.output


def test_a_run_that_starts_from_the_middle_of_a_stage_says_so_and_then_has_all_it_needs(
    workspace, undisturbed
):
    """The newest checkpoint of a run that was preempted lies where that of one that is done would."""
    root = workspace.root
    (root / "preempted").mkdir()
    shutil.copytree(root / "undisturbed/short/step_00000003", root / "preempted/step_00000003")
    (root / "preempted/latest").write_text("step_00000003\n")
    overrides = (f"model={{path: {root}/preempted}}", "stage.short.steps=1", "stage.long.steps=1")
    output = workspace.train("onward", *overrides)
    assert "warning: " in output and "step_00000003 is step 3 of the 6 of stage short" in output
    for gone in ("preempted", "onward/long", "onward/hf"):
        shutil.rmtree(root / gone)
    output = workspace.train("onward", *overrides)
    assert "onward/long/step_00000001" in output and "of stage short" not in output


def test_a_stage_with_checkpoints_cannot_leave_the_recipe_unnoticed(workspace, undisturbed):
    output = workspace.train("undisturbed", "stage.short.name=shorter", code=2)
    assert "stage short: removed or renamed" in output and "undisturbed/short away" in output


def test_a_stage_before_one_that_has_begun_is_not_trained(workspace, undisturbed):
    """As when its directory was deleted to save space: the later stage would see nothing of it."""
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "gap")
    shutil.rmtree(root / "gap/short")
    (root / "gap/recipe.yaml").unlink()
    output = workspace.train("gap", code=2)
    assert "stage short is at step 0 of 6, but stage long after it has begun" in " ".join(output.split())


def test_another_layout_continues_the_same_losses(workspace, undisturbed):
    """From a checkpoint of one process to two: pipeline stages, then context parallel; fp32 rounding only."""
    root = workspace.root
    for name, layout in {"pp": "layout.pp=2", "cp": "stage.long.layout={cp: 2, cp_exchange: p2p}"}.items():
        run = f"resharded-{name}"
        shutil.copytree(root / "undisturbed", root / run)
        shutil.rmtree(root / run / "long")
        (root / run / "metrics.jsonl").unlink()
        (root / run / "recipe.yaml").unlink()
        workspace.train(run, layout, "--processes", "2")
        losses = workspace.losses(run)
        assert losses.keys() == {("long", n) for n in range(1, 5)}
        for key, loss in losses.items():
            assert loss == pytest.approx(undisturbed[key], rel=1e-5)


def test_an_unsharded_optimizer_does_not_continue_a_sharded_one(workspace, undisturbed):
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "unsharded")
    shutil.rmtree(root / "unsharded/long")
    output = workspace.train("unsharded", "layout.distributed_optimizer=false", code=2)
    assert "with layout.distributed_optimizer: true and continued with false" in output
    assert "Traceback" not in output


def test_data_that_changed_under_a_begun_stage_is_noticed(workspace, undisturbed):
    root = workspace.root
    shutil.copytree(root / "undisturbed", root / "moved")
    directory = root / "moved/long/step_00000003"
    shutil.rmtree(root / "moved/long/step_00000004")
    (root / "moved/long/latest").write_text("step_00000003\n")
    (root / "moved/recipe.yaml").unlink()
    manifest = json.loads((directory / "prolong.json").read_text())
    manifest["training"]["stream"] = "of another data set"
    (directory / "checksums.json").unlink()
    (directory / "prolong.json").write_text(json.dumps(manifest))
    assert "batch stream would jump" in workspace.train("moved", code=2)


def test_a_changed_byte_is_noticed_before_training(workspace, undisturbed):
    run = "damaged"
    shutil.copytree(workspace.root / "undisturbed", workspace.root / run)
    shutil.rmtree(workspace.root / run / "long")
    (workspace.root / run / "recipe.yaml").unlink()
    weights = next((workspace.root / run / "short/step_00000006").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert weights.name in workspace.train(run, code=2)


def test_asked_to_stop_it_saves_and_continues_bit_for_bit(workspace, undisturbed):
    """SIGTERM in the middle: exit code 75, a checkpoint off the usual interval, then the same losses."""
    process = workspace.start("asked", "checkpoint.every=100")
    metrics = workspace.root / "asked/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal arrived")
    assert process.returncode == 75, output
    assert "continue with the same command" in output
    workspace.train("asked", "checkpoint.every=100")
    assert workspace.losses("asked") == undisturbed


@pytest.mark.parametrize(
    ("saved", "place"),
    [
        ([], "the beginning of stage short"),
        (["short/step_00000006"], "the beginning of stage long"),
        (["short/step_00000006", "long/step_00000003"], "step 3 of stage long ({run}/long/step_00000003)"),
        (["short/step_00000006", "long/step_00000004"], "step 4 of stage long ({run}/long/step_00000004)"),
    ],
    ids=lambda value: value.split("(")[0] if isinstance(value, str) else "",
)
def test_ctrl_c_says_where_the_next_start_goes_on(
    workspace, undisturbed, monkeypatch, capsys, tmp_path, saved, place
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in saved:
        shutil.copytree(workspace.root / "undisturbed" / name, tmp_path / name)
    recipe = load_recipe(workspace.recipe("interrupted"), [f"run_dir={tmp_path}"])
    monkeypatch.setattr(train, "_ready", lambda *_: None)
    monkeypatch.setattr("megatron_prolong.training.run.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train._train(lambda: recipe)
    assert (
        capsys.readouterr().out == f"stopped; the same command continues from {place.format(run=tmp_path)}\n"
    )


COUNTS_FEEDING = """
import sys
from megatron_prolong.cli.main import run
from megatron_prolong.runtime.watchdog import Watchdog

fed = []
Watchdog.feed = lambda self, step=None: fed.append(step)
try:
    run()
finally:
    print("fed", fed)
"""


def test_the_watchdog_hears_of_every_micro_batch(workspace):
    """A step may honestly take hours: that of a large batch on few GPUs."""
    recipe = workspace.recipe("watched")
    command = [sys.executable, "-c", COUNTS_FEEDING, "train", str(recipe), "stage.short.steps=2"]
    output = subprocess.run(
        [*command, "stage.long.steps=1"], capture_output=True, text=True, check=True
    ).stdout
    verified, step = None, [None] * 4
    assert f"fed {[verified, *step, 2, *step, 3, verified, *step, 2]}" in output
    again = [*command, "stage.long.steps=1", "--replay", "short:2"]
    output = subprocess.run(again, capture_output=True, text=True, check=True).stdout
    assert f"fed {[verified, 1, *step, 2, *step]}" in output


def test_the_logged_flops_are_those_of_the_documents(workspace, undisturbed):
    lines = (workspace.root / "undisturbed/metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    logged = np.array([step["tflops_per_rank"] * 1e12 * step["step_seconds"] for step in steps])
    # Forward and twice that backward; per layer of width 32, 4 heads in 2 groups: q, k, v, projection, MLP.
    weights = 4 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 32 * 100
    without_attention = 3 * 2 * weights * 256
    one_document_per_sequence = (
        3 * 4 * (2 * 32 * 64**2) * 4
    )  # 2·n²·width forward, four sequences of 64 tokens
    attention = (logged - without_attention) / one_document_per_sequence
    assert (attention > 0.5 - 1e-6).all() and (attention < 1).all()  # each sequence is cut into two documents
    assert len(set(attention.round(6))) > 1


def test_a_second_run_on_the_same_directory_is_refused(workspace, undisturbed):
    shutil.copytree(workspace.root / "undisturbed", workspace.root / "shared-directory")
    with DirectoryLock(workspace.root / "shared-directory"):
        output = workspace.train("shared-directory", code=2)
    assert str(os.getpid()) in output


@pytest.mark.parametrize("step", ["short:5", "long:1"])
def test_a_replayed_step_has_the_numbers_it_had_and_leaves_the_run_alone(workspace, undisturbed, step):
    run = workspace.root / "undisturbed"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    trace = workspace.root / "trace" / f"{step.replace(':', '_')}_rank0.json.gz"
    output = workspace.train("undisturbed", "--replay", step, f"--trace={trace.parent}")
    stage, number = step.split(":")
    loss, recorded = re.findall(r"loss ([\d.]+)", output)
    assert loss == recorded == f"{undisturbed[stage, int(number)]:.6g}"
    assert len(re.findall(rf"{workspace.root}/data, shard .*, sample \d+", output)) == 4
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    updates = [event for event in events if event["name"] == "aten::_fused_adamw_"]
    assert len(updates) == 2, "one step updates two groups, with weight decay and without"


def test_a_step_to_replay_must_be_clear(workspace):
    recipe = load_recipe(workspace.recipe("unclear"))
    assert parse_step("short:5", recipe) == (recipe.stages[0], 5)
    for step, message in {
        "5": "say of which stage",
        "mid:5": "no stage mid",
        "short:7": "steps 1 to 6",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_step(step, recipe)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_like_the_undisturbed_run(workspace, undisturbed, kills):
    """kill -9, saving after every step: a complete checkpoint is always the newest; in the end no bit differs."""
    root, name = workspace.root, f"killed{kills}"
    command = [
        sys.executable,
        Path(__file__).with_name("kill_runs.py"),
        workspace.recipe(name, every=1),
        str(kills),
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    print(result)
    assert result["kills"] == kills and result["finished"]
    expected = sums(root / "undisturbed/long/step_00000004")
    for run in result["finished"]:
        assert sums(Path(run) / "long/step_00000004") == expected


def sums(directory: Path) -> dict[str, list]:
    """Checksums of weights, optimizer and their metadata."""
    files = json.loads((directory / "checksums.json").read_text())["files"]
    return {name: files[name] for name in ("__0_0.distcp", "common.pt") if name in files}


def test_weights_and_biases_gets_the_same_numbers_or_says_what_to_install(workspace, monkeypatch):
    """Offline, as on a compute node; without the package, one message before anything is trained."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ["logging.wandb=a-project", "stage.short.steps=2", "stage.long.steps=2"]
    if importlib.util.find_spec("wandb") is None:
        assert "pip install 'megatron-prolong[wandb]'" in workspace.train("tracked", *options, code=2)
        return
    workspace.train("tracked", *options)
    (record,) = (workspace.root / "tracked/wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert all(name.encode() in content for name in ("short/loss", "long/grad_norm", "long/step"))

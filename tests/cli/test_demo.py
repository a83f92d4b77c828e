"""`make demo` in its shortened form: every command of the main job, on real text, in a directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The directory the demo wrote and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    shutil.copytree(EXAMPLES, root / "examples")
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "examples/demo.sh"],
        cwd=root, env={**os.environ, "QUICK": "1", "PATH": commands},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return root / "demo", done.stdout


def test_every_stage_is_done(demo):
    directory, output = demo
    steps = {"1k": 4, "4k": 2, "sft": 2}
    for stage, step in steps.items():
        manifest = json.loads((directory / f"runs/long/{stage}/step_{step:08d}/prolong.json").read_text())
        assert manifest["training"]["step"] == step
    assert f"stage 4k starts with weights and optimizer of demo/runs/long/1k/step_{steps['1k']:08d}" in output
    assert f"stage sft starts with weights of demo/runs/long/4k/step_{steps['4k']:08d}" in output


def test_the_export_has_the_last_long_stage_s_rope_base_and_length(demo):
    directory, output = demo
    config = json.loads((directory / "runs/long/export/config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 64e4
    assert "RoPE base 640000, context 4096" in output  # as transformers loaded it
    assert "assistant:" in output


def test_every_model_is_measured_at_every_length(demo):
    directory, _ = demo
    perplexity = json.loads((directory / "runs/long/evaluation/perplexity.json").read_text())
    needle = json.loads((directory / "runs/long/evaluation/needle.json").read_text())
    assert set(perplexity["models"]) == {"base", "1k", "4k"} and set(needle["models"]) == {"base", "4k"}
    for model in perplexity["models"].values():
        assert [row["context"] for row in model["by_context"]] == [256, 1024, 4096]
        assert all(4 < row["loss"] < 9 for row in model["by_context"])  # ln 2048 = 7.6: hardly trained
    assert (directory / "runs/long/evaluation/perplexity.png").stat().st_size > 0


def test_the_report_shows_the_run(demo):
    directory, _ = demo
    page = (directory / "runs/long/report.html").read_text()
    for stage in ("1k", "4k", "sft"):
        assert stage in page


def test_clean_removes_what_make_made_and_no_run() -> None:
    """`runs` is where every recipe's checkpoints go that does not say otherwise."""
    asked = ["make", "--no-print-directory", "--dry-run", "clean"]  # another make may run this
    said = subprocess.run(asked, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["rm", "-rf", ".venv", "demo"]

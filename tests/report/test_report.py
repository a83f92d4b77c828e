"""`prolong runs` and `prolong report` on run directories as training writes them."""

import errno
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.report.history import find_runs, read_run
from megatron_prolong.runtime.strict_json import dumps

RECIPE = """
name: small
model: {init: {num_layers: 2, hidden_size: 32, num_heads: 2, num_kv_heads: 1, ffn_hidden_size: 64}, tokenizer: tok}
stages:
  - name: short
    sequence_length: 256
    batch_tokens: 1K
    steps: 10
    lr: 1e-3
    mixture: {data/books: 0.75, data/code: 0.25}
  - {name: long, sequence_length: 1K, batch_tokens: 4K, steps: 10, lr: 1e-3, mixture: mock}
"""


def step(stage: str, number: int, **facts: Any) -> str:
    base = {
        "time": 1.7e9 + number, "stage": stage, "step": number, "loss": 5 - number / 10, "lr": 1e-3,
        "grad_norm": 1.0, "tokens": 1024 * number, "tokens_per_second": 512.0, "tflops_per_rank": 0.5,
        "step_seconds": 2.0, "balance": None,
        "valid_tokens": 1000, "peak_memory_bytes": (3 if number == 2 else 2) * 10**9,
        "domains": {"books": 700 * number, "code": 300 * number},
    }  # fmt: skip
    return dumps({**base, **facts})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Stage one done after an interruption at step 6 that went back to step 5; stage two at step 3 of 10."""
    directory = tmp_path / "runs" / "small"
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(RECIPE)
    lines = [json.dumps({"time": 1.7e9, "event": "stage_start", "stage": "short"})]
    lines += [step("short", number) for number in range(1, 7)]
    lines += [step("short", number, loss=1.0) for number in range(5, 11)]
    scores = {"json_kv/8192": 87.5}
    lines += [
        json.dumps({"time": 1.7e9, "event": "evaluation", "stage": "short", "step": 10, "scores": scores})
    ]
    lines += [step("long", number, loss=float("nan") if number == 2 else 2.5) for number in range(1, 4)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"time": 1.7e9, "stage": "lo')
    return directory


def test_steps_after_a_resume_replace_the_earlier_ones(run: Path) -> None:
    history = read_run(run)
    first, second = history.stages
    assert [record["step"] for record in first.records] == list(range(1, 11))
    assert (
        dict(first.curve("loss"))[4] == 4.6
        and dict(first.curve("loss"))[5] == dict(first.curve("loss"))[6] == 1.0
    )
    assert first.done and not second.done and history.current is second
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:7]))  # before it was interrupted
    assert (read_run(run).current.stage.name, read_run(run).current.step) == ("short", 6)


def test_a_run_that_was_sent_back_stands_where_it_is_now(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + step("short", 4) + "\n" + step("short", 5))
    history = read_run(run)
    assert [record["step"] for record in history.stages[0].records] == [1, 2, 3, 4, 5]
    assert history.current is history.stages[0] and history.stages[1].records == []


def test_time_left_is_the_median_step_times_the_steps_left(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_run(run).remaining_seconds == 7 * 2.0
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + step("long", 4, step_seconds=100.0))  # a pause does not count
    assert read_run(run).remaining_seconds == 6 * 2.0
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + step("long", 5, step_seconds=100.0))
    monkeypatch.setattr("megatron_prolong.report.history.RECENT_STEPS", 3)
    assert read_run(run).remaining_seconds == 5 * 100.0, "the older steps do not count"


def test_a_run_that_is_done_stands_at_its_last_stage(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "\n".join(step("long", number) for number in range(4, 11)))
    row = next(
        line for line in CliRunner().invoke(app, ["runs", str(run)]).stdout.splitlines() if "10/10" in line
    )
    assert "done" in row and "512" in row
    (facts,) = json.loads(CliRunner().invoke(app, ["runs", str(run), "--json"]).stdout)
    assert (facts["stage"], facts["done"], facts["remaining_seconds"]) == ("long", True, 0)
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").read_text().count("<td>done</td>") == 2


def test_a_step_that_was_skipped_has_neither_a_loss_nor_a_time(run: Path) -> None:
    """As training writes it: the last of the steps before it are shown."""
    skipped = {
        "time": 1.7e9,
        "stage": "long",
        "step": 4,
        "tokens": 4096,
        "skipped": 1,
        "domains": {"books": 9},
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + dumps(skipped))
    (facts,) = json.loads(CliRunner().invoke(app, ["runs", str(run), "--json"]).stdout)
    assert (facts["step"], facts["loss"], facts["remaining_seconds"]) == (4, 2.5, 6 * 2.0)
    assert [step for step, _ in read_run(run).current.curve("loss")] == [1, 2, 3]
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0


def test_runs_are_listed(run: Path) -> None:
    result = CliRunner().invoke(app, ["runs", str(run.parent)])
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "small" in line)
    for expected in ("long", "3/10", "2.5000", "512", "0:00:14"):
        assert expected in row
    (facts,) = json.loads(CliRunner().invoke(app, ["runs", str(run), "--json"]).stdout)
    assert (facts["stage"], facts["step"], facts["num_steps"], facts["done"]) == ("long", 3, 10, False)
    assert facts["idle_seconds"] == pytest.approx(time.time() - 1.7e9 - 3, abs=600)


def test_a_loss_that_is_no_number_is_shown_and_stays_json(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + step("long", 4, loss=math.nan, grad_norm=math.inf))
        held_out = {"event": "evaluation", "stage": "long", "step": 4, "scores": {"held_out": math.nan}}
        file.write("\n" + dumps(held_out))
    assert '"loss": null' in (run / "metrics.jsonl").read_text()
    row = next(
        line for line in CliRunner().invoke(app, ["runs", str(run)]).stdout.splitlines() if "4/10" in line
    )
    assert " nan " in row
    printed = CliRunner().invoke(app, ["runs", str(run), "--json"]).stdout
    (facts,) = json.loads(printed, parse_constant=pytest.fail)
    assert facts["loss"] is None and facts["step"] == 4
    CliRunner().invoke(app, ["report", str(run)])
    assert "<td>held_out</td><td>–</td><td>nan</td>" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": "long", "step": "x"}',
        '{"stage": "long", "step": 4, "loss": "low"}',
        '{"stage": ["long"], "step": 4}',
        '{"stage": "of an older recipe", "step": 4}',
        '{"stage": "long"}',
        '{"time": "x"}',
        "[1]",
        "\x00",
    ],
)
def test_a_damaged_line_is_skipped(run: Path, line: str) -> None:
    before = read_run(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    assert read_run(run).stages[0] == before.stages[0] and read_run(run).current.step == 3
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0


def test_runs_are_found_in_subdirectories_and_what_is_none_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = shutil.copytree(run, tmp_path / "runs/the older")
    os.utime(older / "recipe.yaml", (1.6e9, 1.6e9))
    checkpoint = older / "short/step_00000005"
    checkpoint.mkdir(parents=True)
    for name in ("recipe.yaml", "prolong.json"):
        (checkpoint / name).write_text(RECIPE)
    assert find_runs(tmp_path) == [older, run] and find_runs(older / "short") == []
    for directory in (checkpoint, tmp_path):
        refused = CliRunner().invoke(app, ["status", str(directory)]).exception
        assert isinstance(refused, UserError) and "no run directory" in str(refused)
    with pytest.raises(UserError, match=r"no run directory, which holds a recipe\.yaml"):
        read_run(tmp_path)
    stat = os.stat

    def closed(path: Any, **how: Any) -> os.stat_result:
        if Path(path).parent.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(os, "stat", closed)
    assert find_runs(tmp_path) == [older, run], "what may not be looked into does not hide the others"
    assert isinstance(CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")]).exception, UserError)


def test_a_run_without_steps_is_listed_too(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert "0/10" in CliRunner().invoke(app, ["runs", str(run)]).stdout
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    html = (run / "report.html").read_text()
    assert "no step yet" in html and "<svg" not in html and "Evaluation" not in html
    (run / "evaluation").mkdir()
    (run / "evaluation/needle.json").write_text('{"score": 0.5}')  # measured afterwards
    CliRunner().invoke(app, ["report", str(run)])
    assert "<td>score</td><td>0.5</td>" in (run / "report.html").read_text()


def test_the_page_has_everything(run: Path) -> None:
    (run / "evaluation").mkdir()
    (run / "evaluation" / "needle.json").write_text(
        json.dumps({"models": {"base": [{"length": 64, "score": 0.5}]}})
    )
    (run / "evaluation" / "half.json").write_text("{")
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0 and "wrote" in result.stdout
    html = (run / "report.html").read_text()
    expectations = """10 / 10|3 / 10|Tokens by domain, stage short|7,000</td><td>70.0%</td><td>75.0%|
        >7.0 K tokens<|>2.1 K tokens<|json_kv/8192|87.5|short 10|3.0 GB|models.base.0.score|cannot be read|
        stage_start|sequence_length: 256|last line written 2023-11-1|
        <td>1,024</td><td>2.5000</td><td>512</td><td>2.00</td><td>0:00:14</td>"""
    for expected in map(str.strip, expectations.split("|")):
        assert expected in html, expected
    assert (
        html.count("<svg") == 5 + 1 + 1 + 1
    )  # curves, domains of both stages, memory; no balance of one rank
    assert "NaN" not in html.split("<pre>")[0] and 'href="http' not in html and "src=" not in html


def test_a_browser_draws_the_page(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html")])
    picture = tmp_path / "page.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = ["--window-size=1100,3000", f"--screenshot={picture}", (tmp_path / "page.html").as_uri()]
    subprocess.run([browser, *options, *shot], capture_output=True, timeout=300, check=True)
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None
    drawn = {colour for _, colour in colours}
    assert {(0, 0x72, 0xB2), (0xE6, 0x9F, 0)} <= drawn  # the first two stages' lines


def test_a_damaged_run_does_not_hide_the_others(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\x9e\xff")  # a disk's rubbish after the last line
    (run.parent / "damaged").mkdir()
    (run.parent / "damaged/recipe.yaml").write_text("")
    result = CliRunner().invoke(app, ["runs", str(run.parent)])
    assert result.exit_code == 0 and "3/10" in result.stdout
    assert f"warning: left out: {run.parent}/damaged/recipe.yaml" in result.stderr


def test_a_run_that_may_not_be_read_does_not_hide_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = shutil.copytree(run, run.with_name("closed")) / "metrics.jsonl"
    opened = Path.open

    def open_(path: Path, *how: Any, **also: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **also)

    monkeypatch.setattr(Path, "open", open_)
    result = CliRunner().invoke(app, ["runs", str(run.parent)])
    assert result.exit_code == 0 and "3/10" in result.stdout
    assert result.stderr == f"warning: left out: {closed}: Permission denied\n"


def test_a_result_that_cannot_be_read_does_not_cost_the_page(run: Path) -> None:
    (run / "evaluation/scores.json").mkdir(parents=True)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0 and "cannot be read" in (run / "report.html").read_text()

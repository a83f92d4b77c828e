"""The batch script on a real Slurm of two nodes: killed, preempted, requeued, and still the undisturbed run.

Each node trains with two processes on the CPU. Needs root, slurmctld, slurmd and munge.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from megatron_prolong.plan.launch import render_script, write_script
from megatron_prolong.recipe.load import load_recipe

pytestmark = pytest.mark.slurm

RECIPE = """\
name: tiny
model:
  init: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64}
  tokenizer: tokenizer
precision: fp32
recompute: none
checkpoint: {every: 4}
stages:
  - {name: one, sequence_length: 64, batch_tokens: 512, steps: 18, lr: 1e-3, mixture: mock}
  - {name: two, sequence_length: 128, batch_tokens: 512, steps: 2, lr: 1e-3, rope_base: 1e6, mixture: mock}
"""
SECONDS = 600.0  # for a job to get anywhere on a busy two-core machine


@pytest.fixture
def workdir(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with recipe, tokenizer and script, and the environment that jobs inherit."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    loaded = load_recipe("recipe.yaml")
    script = render_script(loaded, Path("recipe.yaml"), nodes=2, gpus_per_node=8)
    write_script(script, tmp_path / "script.sh")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("GPUS", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # node1 and node2 are names that only Slurm knows
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Loss of every step so far. A step that was repeated after a crash must have had the same loss."""
    found: dict[tuple[str, int], float] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if "loss" in entry:
            key = (entry["stage"], entry["step"])
            assert found.setdefault(key, entry["loss"]) == entry["loss"], key
    return found


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        log = "".join(path.read_text() for path in Path().glob("tiny-*.log"))
        assert time.monotonic() < deadline, f"waited in vain for {what}; the job's log:\n{log}"
        time.sleep(0.2)


def job_fact(job: str, name: str) -> str:
    """One of the facts of `scontrol show job`, e.g. JobState."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    facts = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
    return facts.get(name, "")


def start_again(job: str) -> None:
    """Slurm holds a requeued job back for two minutes; a test need not. But a node still refuses a job's new
    credential in the second in which the old one was revoked ("Job credential revoked"): the job fails at once."""
    time.sleep(3)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def seconds_until_start(job: str) -> float:
    return (datetime.fromisoformat(job_fact(job, "StartTime")) - datetime.now()).total_seconds()


def wait_for_requeue(job: str, restarts: int) -> None:
    def requeued() -> bool:
        return (job_fact(job, "Restarts"), job_fact(job, "JobState")) == (str(restarts), "PENDING")

    wait_for(f"requeue {restarts}", requeued)


def processes_of(node: str) -> list[int]:
    """Training processes on one of the pretended nodes."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            command = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        here = f"SLURMD_NODENAME={node}".encode() in environment and b"LOCAL_RANK=0" in environment
        if here and b"megatron_prolong" in command:
            found.append(int(directory.name))
    return found


def test_killed_preempted_and_requeued_it_is_still_the_same_run(cluster: None, workdir: Path) -> None:
    undisturbed = ["prolong", "train", "recipe.yaml", "run_dir=undisturbed", "--processes", "4"]
    subprocess.run(undisturbed, check=True, capture_output=True, timeout=SECONDS)
    expected = losses(Path("undisturbed"))
    assert len(expected) == 20

    submitted = subprocess.run(
        ["sbatch", "--parsable", "script.sh"], capture_output=True, text=True, check=True
    )
    job = submitted.stdout.strip()
    run_dir = Path("runs/tiny")

    # The start fails: the job puts itself back for a while.
    wait_for("a start", lambda: all(map(processes_of, ("node1", "node2"))))
    for victim in processes_of("node1") + processes_of("node2"):
        os.kill(victim, 9)
    wait_for_requeue(job, restarts=1)
    wait_for("the wait", lambda: seconds_until_start(job) > 540)
    assert job_fact(job, "Comment") == "1"

    # A process of the second node dies: the whole job ends at once, and puts itself back for what was saved.
    start_again(job)
    wait_for("six steps", lambda: len(losses(run_dir)) >= 6)
    (victim,) = processes_of("node2")
    os.kill(victim, 9)
    wait_for_requeue(job, restarts=2)
    assert job_fact(job, "Comment") == "", "the failed start is forgiven"
    before = len(losses(run_dir))
    assert before < 18

    # Asked to stop as before a time limit: it saves and puts itself back.
    start_again(job)
    wait_for("more steps", lambda: len(losses(run_dir)) > before)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    wait_for_requeue(job, restarts=3)
    saved = int((run_dir / "one" / "latest").read_text().removeprefix("step_"))
    assert saved == max(step for stage, step in losses(run_dir)), (
        "the last step before the stop was not saved"
    )

    start_again(job)
    wait_for("the end", lambda: job_fact(job, "JobState") == "COMPLETED")
    assert losses(run_dir) == expected
    log = Path(f"tiny-{job}.log").read_text()
    assert [f"start {count}" in log for count in range(5)] == [True, True, True, True, False]


def test_what_is_missing_ends_the_job_before_training(cluster: None, workdir: Path) -> None:
    shutil.rmtree("tokenizer")
    submitted = subprocess.run(
        ["sbatch", "--parsable", "script.sh"], capture_output=True, text=True, check=True
    )
    job = submitted.stdout.strip()
    wait_for("the failure", lambda: job_fact(job, "JobState") == "FAILED")
    log = Path(f"tiny-{job}.log").read_text()
    assert "tokenizer: no tokenizer.json there" in log
    assert not Path("runs").exists()


def test_a_mistake_met_behind_a_checkpoint_ends_the_job(cluster: None, workdir: Path) -> None:
    """All launchers end with 2, and the job is not put back to meet it again.

    They meet although sbatch is to hand over these variables alone, as some sites have it.
    """
    environment = os.environ | {"OVERRIDES": "stage.one.lr=1e30 stage.one.warmup=0"}
    exported = "--export=PATH,PYTHONPATH,GPUS,MASTER_ADDR,OMP_NUM_THREADS,OVERRIDES"
    words = ["sbatch", "--parsable", exported, "script.sh"]
    submitted = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    job = submitted.stdout.strip()
    wait_for("the failure", lambda: job_fact(job, "JobState") == "FAILED")
    log = Path(f"tiny-{job}.log").read_text()
    assert log.count("error: stage one: 5 steps in a row") == 1 and "torch" not in log
    assert (job_fact(job, "Restarts"), job_fact(job, "ExitCode")) == ("0", "2:0")
    assert Path("runs/tiny/one/latest").exists()

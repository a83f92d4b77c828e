"""Data jobs as a Slurm array: each job does its share, the last one joins them, and a job that was killed is
submitted again alone. The result is that of one process, byte for byte."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

# A task per file; job 1 dies hard in its third task when told to.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from megatron_prolong.data import job, tokenize as t

t.TASK_BYTES = 300
run_once, done = job._run_once, []

def dying(work, task):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    run_once(work, task)
    done.append(task)

if sys.argv[1] == "die" and os.environ["SLURM_ARRAY_TASK_ID"] == "1":
    job._run_once = dying
slurm = os.environ if "SLURM_ARRAY_TASK_ID" in os.environ else None
t.tokenize(sorted(map(str, Path("in").iterdir())), "tokenizer", sys.argv[2], slurm=slurm)
"""


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def workdir(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "in").mkdir()
    for number in range(15):
        text = f"text {number}\n" * 60
        (tmp_path / "in" / f"{number:02}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return tmp_path


def submit(array: str, *command: str) -> int:
    """Exit code of the array's worst job, when all have ended."""
    words = ["sbatch", "--wait", f"--array={array}", "--output=job-%a.log", "--wrap", shlex.join(command)]
    return subprocess.run(words, capture_output=True, timeout=120).returncode


def log() -> str:
    return "".join(path.read_text() for path in sorted(Path().glob("job-*.log")))


def test_a_killed_job_of_an_array_is_submitted_again_alone(cluster: None, workdir: Path) -> None:
    program = [sys.executable, "-c", PROGRAM]
    subprocess.run([*program, "live", "whole"], check=True, timeout=120)
    assert submit("0-2", *program, "die", "out") != 0
    assert not Path("out").exists()
    finished = {path.name for path in Path("out.partial").glob("[0-9]*") if (path / "index.json").exists()}
    assert finished == {f"{number:05}" for number in range(15)} - {"00007", "00010", "00013"}
    assert submit("1", *program, "live", "out") == 0, log()
    assert files_of(Path("out")) == files_of(Path("whole"))


def test_the_command(cluster: None, workdir: Path) -> None:
    command = ["prolong", "data", "tokenize", "in", "--tokenizer", "tokenizer", "--domain", "d"]
    subprocess.run([*command[:4], "whole", *command[4:]], check=True, capture_output=True, timeout=120)
    assert submit("3-7:2", *command[:4], "out", *command[4:], "--slurm-array") == 0, log()
    assert files_of(Path("out")) == files_of(Path("whole"))

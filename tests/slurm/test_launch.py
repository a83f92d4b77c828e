"""The rendered batch scripts: golden files, shellcheck, and the same script run by plain bash without Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prolong.cli import main
from megatron_prolong.errors import UserError
from megatron_prolong.plan.launch import render_script, submit_script, write_script
from megatron_prolong.recipe.load import load_recipe
from tests.recipe.conftest import write_model

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: tiny
model: {path: model}
stages:
  - {name: one, sequence_length: 1K, batch_tokens: 8K, steps: 2, lr: 1e-5, mixture: mock}
"""
# Python, because a shell cannot take back a signal that its parent ignores, and training is Python.
WORKER = """\
import os, signal, sys, time

signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), sys.exit(75)))
for step in range(int(os.environ.get("STEPS", "0"))):
    print("step", flush=True)
    time.sleep(0.1)
"""


def render(recipe: Path, *overrides: str, nodes: int = 1, file: str = "script.sh") -> str:
    loaded = load_recipe(recipe, overrides)
    return render_script(loaded, recipe, overrides, nodes=nodes, gpus_per_node=8, file=file)


@pytest.mark.parametrize("name", ["prolong_64k", "prolong_512k", "prolong_sft"])
def test_the_shipped_scripts_are_what_is_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prolong launch examples/NAME.yaml --output examples/NAME.sh` writes them anew."""
    monkeypatch.chdir(ROOT)
    script = Path("examples") / f"{name}.sh"
    assert script.read_text() == render(script.with_suffix(".yaml"), file=str(script))
    assert os.access(script, os.X_OK)


def test_nodes_and_overrides_are_written_into_the_script(tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(RECIPE)
    overrides = [
        "stage.one.lr=2e-5", "run_dir=$HOME/it's", "model.path=a}b`c`", "stage.one.mixture={a: 0.5, b c: 0.5}"
    ]  # fmt: skip
    script = render(recipe, *overrides, nodes=4, file="my script.sh")
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=1\n#SBATCH --gres=gpu:8\n" in script
    assert f"RECIPE='{recipe}'\n" in script
    assert '# OVERRIDES="stage.one.lr=2e-5 layout.cp=4"' in script, "an example that this recipe takes"
    lines = [line for line in script.splitlines() if line.startswith(("RECIPE=", "read -ra", "OVERRIDES="))]
    show = 'printf "%s\\n" "$RECIPE" "${OVERRIDES[@]}"'
    result = subprocess.run(
        ["bash", "-euc", "\n".join([*lines, show])],
        env={"PATH": os.environ["PATH"], "HOME": "/home/x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == [str(recipe), *overrides]
    assert "#   sbatch 'my script.sh'\n" in script


@pytest.mark.parametrize("job", ["1", "19999", "4294901760"])
def test_the_port_is_none_that_the_kernel_lends(job: str, tmp_path: Path) -> None:
    """Its range begins at 32768 (ip_local_port_range); a connection that has the port would end the job."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (line,) = re.findall("^export MASTER_PORT=.*$", render(tmp_path / "recipe.yaml"), re.MULTILINE)
    show = ["bash", "-c", f"{line}; echo $MASTER_PORT"]
    result = subprocess.run(show, env={"SLURM_JOB_ID": job}, capture_output=True, text=True, check=True)
    assert 10000 < int(result.stdout) < 32768


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("examples/*.sh"), *ROOT.glob("tools/*.sh")]), ids=lambda path: path.name
)
def test_shellcheck(script: Path) -> None:
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="no sbatch on this machine"):
        submit_script("#!/bin/bash\n")


def put(directory: Path, bodies: dict[str, str]) -> None:
    """Stand-ins for commands, as name and shell script."""
    for name, body in bodies.items():
        command = directory / name
        command.write_text(f"#!/bin/bash\n{body}")
        command.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for prolong and sbatch that write their arguments to calls.log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "worker.py").write_text(WORKER)
    directory = tmp_path / "bin"
    directory.mkdir()
    log = f'echo "$(basename "$0") $* WORLD_SIZE=${{WORLD_SIZE:-}}" >>{tmp_path}/calls.log\n'
    bodies = {
        # A worker saves on USR1 and exits with 75.
        "prolong": 'if [[ -n ${FAIL_CHECK:-} ]]; then echo "error: no data" >&2; exit 2; fi\n'
        f"if [[ $* == *--processes* ]]; then exec {sys.executable} {tmp_path}/worker.py; fi\n",
        "sbatch": "cat >/dev/null; echo '42;cluster'\n",
    }
    put(directory, {name: log + body for name, body in bodies.items()})
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["OVERRIDES", "MASTER_ADDR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPUS", "2")
    write_script(render(Path("recipe.yaml"), "stage.one.steps=3"), Path("script.sh"))
    return tmp_path / "calls.log"


def test_without_slurm_it_checks_and_trains_on_this_machine(commands: Path) -> None:
    result = subprocess.run(["./script.sh"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    check, status, train = commands.read_text().splitlines()
    assert check == "prolong train recipe.yaml stage.one.steps=3 --check WORLD_SIZE=2"
    assert status == "prolong status recipe.yaml stage.one.steps=3 WORLD_SIZE="
    assert train == "prolong train recipe.yaml stage.one.steps=3 --processes 2 WORLD_SIZE="


def test_overrides_of_the_environment_follow_the_scripts_own(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERRIDES", "stage.one.lr=1e-4 layout.tp=2")
    subprocess.run(["bash", "script.sh"], check=True, capture_output=True, timeout=30)
    expected = "prolong train recipe.yaml stage.one.steps=3 stage.one.lr=1e-4 layout.tp=2 --check"
    assert expected in commands.read_text()


def test_a_failed_check_ends_the_job_before_training(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL_CHECK", "1")
    result = subprocess.run(["bash", "script.sh"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert "error: no data" in result.stderr
    assert "--processes" not in commands.read_text()


@pytest.fixture
def job(commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same within job 42 of Slurm, whose scontrol keeps a comment and writes all else to calls.log."""
    bodies = {
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"\n',
        "scontrol": """case "$*" in
            show*) echo node1 ;;
            *Comment=*) echo "${3#*=}" >comment ;;
            *) echo "scontrol $*" >>calls.log ;;
        esac\n""",
        "squeue": "cat comment 2>/dev/null\n",
    }
    put(commands.parent / "bin", bodies)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node1")
    return commands


def asked_to_stop(number: signal.Signals, code: int = 75) -> str:
    """What the script prints that gets this signal at its first step, and ends with `code`."""
    with subprocess.Popen(["bash", "script.sh"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = ""
        while "step" not in seen:
            seen += process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(number)
        seen += process.stdout.read()
        assert process.wait(timeout=30) == code
    return seen


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_training_processes_and_their_save_is_waited_for(
    commands: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPS", "300")
    seen = asked_to_stop(number)
    assert "asked to stop: saving" in seen and "saved" in seen


@pytest.mark.parametrize(
    ("code", "new_checkpoint", "requeued"),
    [
        (75, False, True),
        (2, True, False),
        (1, False, True),
        (1, True, True),
        (1, None, True),
        (137, True, True),
        (0, True, False),
    ],
)
def test_what_a_job_met_decides_whether_it_goes_back_into_the_queue(
    code: int, new_checkpoint: bool | None, requeued: bool, job: Path
) -> None:
    """Not where that is a mistake (exit code 2) that it would meet again. At once where it made a checkpoint, later
    where it made none (None: nobody can say)."""
    meanwhile = {True: "echo 12 >stands;", False: "", None: "rm stands;"}[new_checkpoint]
    bodies = {
        "prolong": f"""case "$*" in
            status*) cat stands ;;
            *--processes*) {meanwhile} exit {code} ;;
        esac\n""",
    }
    put(job.parent / "bin", bodies)
    Path("stands").write_text("8\n")
    result = subprocess.run(["bash", "script.sh"], capture_output=True, text=True, timeout=30)
    assert result.returncode == code, result.stderr
    calls = job.read_text() if job.exists() else ""
    assert ("scontrol requeue 42" in calls) == requeued
    assert ("StartTime=now+10minutes" in calls) == (requeued and code != 75 and not new_checkpoint)


def failing_starts(job: Path, where: str, count: int) -> list[str]:
    """For each of so many starts of the job what scontrol was asked for, where the command in `where` fails."""
    put(
        job.parent / "bin",
        {"prolong": f'case "$*" in {where}) exit 1 ;; status*) cat stands ;; esac\n'},
    )
    asked = []
    for _ in range(count):
        job.unlink(missing_ok=True)
        result = subprocess.run(["bash", "script.sh"], capture_output=True, text=True, timeout=30)
        assert result.returncode == 1, result.stderr
        asked.append(job.read_text() if job.exists() else "")
    return asked


@pytest.mark.parametrize("where", ["*--check*", "status*", "*--processes*"])
def test_starts_that_fail_in_a_row_are_tried_again_three_times(where: str, job: Path) -> None:
    """A file server's fault passes, and the next start may be on other nodes."""
    Path("stands").write_text("8\n")
    *tried, last, anew = failing_starts(job, where, 5)
    later = "scontrol requeue 42\nscontrol update JobId=42 StartTime=now+{}minutes\n"
    assert tried == [later.format(minutes) for minutes in (10, 20, 40)]
    assert last == "", "it stays failed"
    assert anew == tried[0], "somebody has started it again"


def test_a_new_checkpoint_in_between_forgives_the_failed_starts(job: Path) -> None:
    Path("stands").write_text("8\n")
    *_, third = failing_starts(job, "*--processes*", 3)
    (got_on,) = failing_starts(job, "*--processes*) echo 12 >stands; exit 1 ;; no", 1)
    (next_one,) = failing_starts(job, "*--processes*", 1)
    assert "now+40minutes" in third
    assert got_on == "scontrol requeue 42\n"
    assert "now+10minutes" in next_one


def test_a_job_whose_failed_starts_cannot_be_counted_stays_failed(job: Path) -> None:
    """It might come back for ever."""
    Path("stands").write_text("8\n")
    refuse = "[[ $* != *Comment=* ]] && echo $* | grep -v show >>calls.log\n"
    put(job.parent / "bin", {"scontrol": refuse})
    assert failing_starts(job, "*--processes*", 1) == [""]


@pytest.mark.parametrize("asked", [False, True])
def test_the_exit_code_is_training_s_where_slurm_refuses_to_requeue(
    asked: bool, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is asked to stop after training has ended: `prolong status` does so here, the second time."""
    ask = "kill -USR1 $(<script.pid); sleep 0.2;"
    ask = f"if [[ -e ended ]]; then {ask if asked else ''} echo 12; else echo 8; fi"
    bodies = {
        "scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "scontrol $*" >>calls.log; exit 1; fi\n',
        "squeue": "echo 1-00:00:00\n",
        "prolong": f"""case "$*" in
            status*) {ask} ;;
            *--processes*) touch ended; exit {1 if asked else 75} ;;
        esac\n""",
    }
    put(job.parent / "bin", bodies)
    words = ["bash", "-c", "echo $$ >script.pid; exec bash script.sh"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert result.returncode == (1 if asked else 75), result.stderr
    assert "scontrol requeue 42" in job.read_text()


@pytest.mark.parametrize(
    ("limit", "requeued"),
    [("20:00", False), ("1:00:00", False), ("10:00:00", True), ("1-00:00:00", True), ("UNLIMITED", True)],
)
def test_a_time_limit_within_the_notice_is_told_and_does_not_start_the_job_for_ever(
    limit: str, requeued: bool, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm asks such a job to stop as soon as it has started; a preemption may do so too."""
    bodies = {
        "squeue": f"sleep 0.5; echo {limit}\n",  # the answer comes after training has ended
    }
    put(job.parent / "bin", bodies)
    monkeypatch.setenv("STEPS", "300")
    seen = asked_to_stop(signal.SIGUSR1)
    assert "saved" in seen and ("time limit must be longer" in seen) != requeued
    assert ("scontrol requeue 42" in job.read_text()) == requeued


def test_a_job_that_is_asked_to_stop_before_training_listens_is_no_failed_start(job: Path) -> None:
    """It ends from the signal then: an hour in the queue, for four preemptions, and it would stay there."""
    put(job.parent / "bin", {"prolong": "[[ $* != *--processes* ]] || { echo step; exec sleep 30; }\n"})
    asked_to_stop(signal.SIGUSR1, 128 + signal.SIGUSR1)
    assert job.read_text() == "scontrol requeue 42\n"


def test_a_job_that_is_asked_to_stop_during_its_check_says_why_it_ends(commands: Path) -> None:
    prolong = commands.parent / "bin/prolong"
    prolong.write_text("#!/bin/bash\necho checking\nsleep 1\n")
    with subprocess.Popen(["bash", "script.sh"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "checking" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGUSR1)
        said = process.stdout.read()
        assert process.wait(timeout=30) == 75
    assert said.startswith("error: asked to stop right at the start")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluation={tasks: [nothing]}", "nothing"),
        ("checkpoint.keep=1000000", "no room for the checkpoints"),
        ("layout.tp=3", "8 ranks cannot be divided"),
    ],
)
def test_nothing_is_submitted_that_would_not_start(
    commands: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    problem: str,
) -> None:
    write_model(Path("model"))
    arguments = [
        "launch",
        "recipe.yaml",
        "stage.one.steps=1000000",
        "checkpoint.every=1",
        "--submit",
        override,
    ]
    monkeypatch.setattr("sys.argv", ["prolong", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert stop.value.code == 2 and problem in capsys.readouterr().err
    assert not commands.exists()


def test_submit_hands_the_script_to_sbatch(commands: Path) -> None:
    assert submit_script(Path("script.sh").read_text()) == "42"
    assert "sbatch --parsable" in commands.read_text()
    (commands.parent / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: no partition' >&2; exit 1\n"
    )
    with pytest.raises(UserError, match=r"refused the job: sbatch: error: no partition$"):
        submit_script("#!/bin/bash\n")


def test_all_stages_wait_for_each_other(commands: Path) -> None:
    subprocess.run(
        ["bash", ROOT / "examples" / "prolong_all.sh", "-N", "8"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    first, second, third = commands.read_text().splitlines()
    assert "--dependency" not in first and "-N 8" in first and "prolong_64k.sh" in first
    assert "--dependency=afterok:42 -N 8" in second and "prolong_512k.sh" in second
    assert "--dependency=afterok:42 -N 8" in third and "prolong_sft.sh" in third

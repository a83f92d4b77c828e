"""What the user has to mend is said once, however many ranks there are, and every one of them exits with 2."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_prolong.errors import JointError, PassingError, RankLost, UserError
from megatron_prolong.recipe.shape import MANIFEST
from megatron_prolong.runtime import processes
from megatron_prolong.runtime.agreement import on_main, together
from megatron_prolong.runtime.checksums import CHECKSUMS, write_checksums
from megatron_prolong.runtime.launch import distributed
from megatron_prolong.runtime.lock import DirectoryLock
from megatron_prolong.runtime.rendezvous import Rendezvous
from megatron_prolong.runtime.signals import STOP_SIGNALS
from megatron_prolong.training.checkpoint import verify_checkpoint
from tests.ranks import run_ranks


def test_a_directory_in_use_is_told_by_rank_0_alone(workspace) -> None:
    with DirectoryLock(workspace.root / "taken"):
        ranks = workspace.start_ranks("taken", "layout.cp=2")
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0].startswith("error: ") and "is in use by process" in said[0] and said[0].count("\n") == 1
    assert said[1] == ""


def test_a_recipe_that_no_rank_can_read_is_told_by_rank_0_alone(workspace) -> None:
    ranks = workspace.start_ranks("unread", "layout.tpp=2")
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0].startswith("error: ") and said[0].count("did you mean layout.tp?") == 1 and said[1] == ""


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lr", "1e-3", "stages.short.lr: 0.001, but 0.01 on rank 0"),
        ("mixture", "{{{root}/changed: 1.0}}", "stage short: its data here is not rank 0's"),
    ],
)
def test_ranks_that_would_train_different_models_do_not_begin(workspace, key, value, said) -> None:
    """As when a node has another copy of the recipe, or an older one of the data."""
    if key == "mixture":
        workspace.write_data("changed", seed=1)
    override = f"stage.short.{key}={value.format(root=workspace.root)}"
    ranks = workspace.start_ranks("alike", on_rank_1=[override])
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert errors[0].startswith("error: rank 1: ") and said in errors[0] and errors[1] == ""


def damage_what_rank_1_reads(checkpoint: Path) -> None:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    damaged = next(path for path in files[1::2] if path.suffix == ".distcp")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")


def draw_from_another_data_set(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["training"]["stream"] = "of another data set"
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / CHECKSUMS).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage_what_rank_1_reads, "rank 1: {checkpoint} is damaged; copy it again"),
        (draw_from_another_data_set, "stage short cannot continue from {checkpoint}: its data has changed"),
    ],
)
def test_what_a_stage_cannot_start_from_is_told_by_rank_0_alone(workspace, undisturbed, spoil, said) -> None:
    run = workspace.root / spoil.__name__
    shutil.copytree(workspace.root / "undisturbed", run)
    shutil.rmtree(run / "long")
    shutil.rmtree(run / "short/step_00000006")
    (run / "short/latest").write_text("step_00000003\n")
    spoil(run / "short/step_00000003")
    ranks = workspace.start_ranks(run.name)
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert errors[0].startswith("error: " + said.format(checkpoint=run / "short/step_00000003"))
    assert errors[1] == ""


def test_local_processes_end_as_a_single_one_would(workspace) -> None:
    """Without the launcher's own report."""
    command = ["-m", "megatron_prolong", "train", str(workspace.recipe("taken")), "--processes", "2"]
    with DirectoryLock(workspace.root / "taken"):
        found = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240)
    assert found.returncode == 2, found.stderr
    assert "is in use by process" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({0: 1, 1: -signal.SIGKILL}, 128 + signal.SIGKILL, "error: rank 1 was ended by signal 9\n"),
        ({0: 1, 2: -signal.SIGKILL}, 1, ""),  # ended later: by the launcher, or for another reason
        ({1: 75, 0: -signal.SIGTERM}, 75, ""),  # rank 0 had saved too, and the launcher ended it
        ({0: 2, 1: -signal.SIGABRT}, 2, ""),
        ({0: 1, 1: -signal.SIGTERM}, 1, ""),  # the launcher ended what rank 0 had left waiting
        ({0: 1, 1: 2}, 1, ""),
    ],
)
def test_of_processes_that_end_at_the_same_time_a_killed_one_is_named(
    codes, code: int, said: str, capsys
) -> None:
    """torch's launcher looks ten times a second, and of several that it finds takes the lowest rank."""
    failures = {rank: ProcessFailure(rank, 1, exitcode, error_file="") for rank, exitcode in codes.items()}
    for rank, failure in failures.items():
        failure.timestamp = 1 + (rank == 2)
    with pytest.raises(SystemExit) as left:
        processes._exit(ChildFailedError("prolong", failures))
    assert left.value.code == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_local_processes_save_and_stop_as_a_single_one_would(workspace, number: signal.Signals) -> None:
    """torchrun would end at SIGUSR1 and leave them to themselves, and at SIGTERM kill them if a save takes long."""
    run = f"asked-{number.name}"
    process = workspace.start(
        run, "--processes", "2", "checkpoint.every=100000", "stage.short.steps=100000", "logging.every=1000"
    )
    metrics = workspace.root / run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "continue with the same command" in output and (workspace.root / run / "short/latest").exists()


def test_a_port_that_is_taken_or_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT 70000: "), distributed():
        pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=f"MASTER_PORT {port}: .*address already in use"), distributed():
            pass


def test_so_it_is_where_the_launchers_of_several_nodes_would_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told in the fifty lines of a traceback."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "disable", lambda: None)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        first_of_two = Rendezvous(0, 2, 0, 2, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(UserError, match=r"^node 0 of 2 .* MASTER_PORT \d+: .*address already in use$"):
            processes.start_processes([], 2, first_of_two)


def test_a_launcher_that_is_interrupted_ends_as_its_processes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise SignalException("Ctrl-C", signal.SIGINT)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "disable", lambda: None)
    monkeypatch.setattr(processes, "elastic_launch", lambda *_: interrupted)
    with pytest.raises(SystemExit) as left:
        processes.start_processes([], 2, Rendezvous(0, 1, 0, 1, "127.0.0.1", 1))
    assert left.value.code == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("own", "others", "code", "said"),
    [
        (PassingError("try again"), [(None, 2), (None, 2)], 1, "try again"),
        (
            PassingError("try again"),
            [("no such file", 2), ("try again", 1)],
            2,
            "try again\nrank 1: no such file",
        ),
        (None, [("no such file", 2), ("no such file", 2)], 2, "rank 1: no such file"),
    ],
)
def test_a_job_tries_again_only_if_all_that_went_wrong_may_pass(
    own: UserError | None, others: list, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def action() -> None:
        if own:
            raise own

    def gathered(problems: list, mine: tuple, _: object) -> None:
        problems[:] = [mine, *others]

    monkeypatch.setattr(dist, "get_world_size", lambda *_: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(JointError) as raised:
        together(action)
    assert (str(raised.value), raised.value.exit_code, raised.value.said_here) == (said, code, True)


def test_a_fault_that_names_no_file_keeps_its_traceback() -> None:
    def lost() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        together(lost)


def missing_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        Path("/not/there").read_text()


def refused_on_both() -> None:
    raise UserError("no such recipe")


def full_on_rank_0() -> None:
    def save() -> None:
        raise UserError(f"the disk of rank {os.environ['RANK']} is full")

    on_main(save)


def other_copy_on_rank_1() -> None:
    copy = Path(os.environ["COPIES"], os.environ["RANK"])
    copy.mkdir()
    (copy / "weights").write_text(f"of model {copy.name}")
    write_checksums(copy)
    verify_checkpoint(copy)


def broken_on_rank_0() -> None:
    dist.barrier()  # rank 0 holds the rendezvous: gone before rank 1 has met it, there would be no collective yet
    if os.environ["RANK"] == "0":
        raise AssertionError("a defect of ours")


def run_rank(rank: int, directory: str, action) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    try:
        with distributed():
            together(action)
        text = "nothing"
    except JointError as error:
        text = f"{error}, said here: {error.said_here}"
    except (RankLost, AssertionError) as error:
        text = f"{type(error).__name__}: {error}"
    Path(directory, str(rank)).write_text(text)
    os._exit(0)  # as the command does when another rank is gone


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (missing_on_rank_1, "rank 1: /not/there: No such file or directory"),
        (refused_on_both, "no such recipe"),
        (full_on_rank_0, "the disk of rank 0 is full"),
        (
            other_copy_on_rank_1,
            "rank 1: {copies}/1 is not what rank 0 has under this name; copy it to this node again",
        ),
        (broken_on_rank_0, None),
    ],
)
def test_every_rank_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action, said) -> None:
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 20000))
    monkeypatch.setenv("COPIES", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run_rank, args=(rank, str(tmp_path), action)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    if said is None:
        assert first == "AssertionError: a defect of ours"
        assert second.startswith("RankLost: rank 1 lost another rank in a collective")
    else:
        said = said.format(copies=tmp_path / "copies")
        assert (first, second) == (f"{said}, said here: True", f"{said}, said here: False")


def wait_for_rank_0() -> None:
    patient = dist.new_group(backend="gloo")
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))
    assert on_main(lambda: time.sleep(2) or "converted", patient) == (
        None if dist.get_rank() else "converted"
    )


def test_a_conversion_may_take_longer_than_a_collective() -> None:
    """In a group of its own, whose timeout is long."""
    run_ranks(2, wait_for_rank_0)


FAILS_ALONE = """
import atexit
import sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from megatron_prolong.cli import main
from megatron_prolong.errors import RankLost, UserError

def app(**_):
    raise eval(sys.argv[2])

main.app = app
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(sys.argv[1]))
atexit.register(print, "an orderly end")
main.run()
"""


@pytest.mark.parametrize(
    ("ranks", "error", "code", "said"),
    [
        (2, "UserError('no such file')", 2, "error: no such file\n"),
        (2, "RankLost('rank 1 is gone')", 1, "error: rank 1 is gone\n"),
        (2, "MemoryError('of the GPU')", 1, "MemoryError: of the GPU\n"),
        (2, "SystemExit(75)", 75, ""),
        (1, "MemoryError('of the GPU')", 1, "MemoryError: of the GPU\n"),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_for_the_others_at_its_end(ranks, error, code, said) -> None:
    """As the interpreter's end does: it aborts the groups that are left (nccl issue 1777)."""
    command = [sys.executable, "-c", FAILS_ALONE, str(ranks), error]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (found.returncode, found.stderr[len(found.stderr) - len(said) :]) == (code, said), found.stderr
    assert ("an orderly end" in found.stdout) == (ranks == 1)


FAILS_IN_STEP_3 = """
import sys
import torch
from megatron_prolong.cli import main
from megatron_prolong.training.prepare import StageRun

def update(self, step, *batch, make=StageRun.update):
    if step == 2:
        raise {error}
    return make(self, step, *batch)

StageRun.update = update
main.run()
"""


def test_a_full_gpu_and_a_lost_rank_are_told_with_the_step(workspace) -> None:
    full = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
    is_full = "step 3 of stage short: the GPU's memory is full (CUDA out of memory. Tried to "
    lost = 'RuntimeError("Connection closed by peer")'
    for error, more, said in (
        (full, [], f"rank 0, {is_full}"),
        (full, ["--replay", "short:3"], f"rank 0, {is_full}"),
        (lost, ["--replay", "short:3"], "rank 0 lost another rank in step 3 of stage short; "),
    ):
        program = FAILS_IN_STEP_3.format(error=error)
        command = [sys.executable, "-c", program, "train", str(workspace.recipe("full")), *more]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.startswith(f"error: {said}") and ended.stderr.count("\n") == 1

"""What a process of a job is allowed, before it looks for the others."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_prolong.errors import UserError
from megatron_prolong.runtime import launch
from megatron_prolong.runtime.launch import _share_cores, distributed
from megatron_prolong.runtime.rendezvous import read_rendezvous


def test_all_open_files_that_are_permitted_are_used_and_too_few_are_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 40, PyTorch ends with a traceback of its own; with 16 it waits for ever."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    with distributed():
        assert asked == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match="may open 40 files here; training takes at least 512"), distributed():
        pass
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 2048))
    many = {**TORCHRUN, "WORLD_SIZE": "1024", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in many.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"at least 3581 \(sockets to all ranks .*ulimit -n 7162"),
        distributed(),
    ):
        pass


def test_an_error_of_a_process_alone_leaves_no_process_group() -> None:
    with pytest.raises(UserError, match="mine"), distributed():
        raise UserError("mine")
    assert not dist.is_initialized()


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("launcher", "cores", "threads"),
    [
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 128, 64),
        (TORCHRUN, 16, 4),  # a job with 16 of the machine's cores; too many threads wait for each other
        (SRUN, 128, 32),
        (SRUN, 16, 16),  # of its own
        ({**TORCHRUN, "OMP_NUM_THREADS": "3"}, 16, None),
        ({}, 16, None),
    ],
)
def test_ranks_share_the_cores_of_their_job(
    launcher: dict[str, str], cores: int, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", **launcher}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    _share_cores(read_rendezvous(environment))
    assert set_to == ([] if threads is None else [threads])


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[str, str]:
    found = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1", **variables}
    monkeypatch.setattr(os, "environ", found)
    return found


@pytest.mark.parametrize(
    ("local_rank", "said"), [(1, "as far as this"), (2, "local rank 2 has no GPU of its own")]
)
def test_more_processes_than_gpus_are_refused(
    local_rank: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, RANK=str(local_rank), WORLD_SIZE="3", LOCAL_RANK=str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    def met(backend: str, *_: object) -> None:
        assert "nccl" in backend
        raise UserError("as far as this")

    monkeypatch.setattr(launch, "_meet", met)
    with pytest.raises(UserError, match=said), distributed():
        pass


@pytest.mark.parametrize(
    ("variables", "interface", "given"),
    [
        (TORCHRUN, "eth7", None),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, "eth7", "eth7"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, None, None),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "mine"}, "eth7", "mine"),
        ({**SRUN, "SLURM_NNODES": "2"}, "eth7", "eth7"),
        ({**SRUN, "SLURM_NNODES": "1"}, "eth7", None),
        (SRUN, "eth7", None),
    ],
)
def test_gloo_is_told_where_the_other_machines_are_if_there_are_any(
    variables: dict[str, str], interface: str | None, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_one(*_: object, **__: object) -> None:
        raise RuntimeError("Gloo connectFullMesh failed\nat line 1")

    found = environment(monkeypatch, **variables)
    monkeypatch.setattr(launch, "interface_towards", lambda _: interface)
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", no_one)
    said = (
        "could not meet .* MASTER_PORT 1: Gloo connectFullMesh failed; set GLOO_SOCKET_IFNAME to the network"
    )
    with pytest.raises(UserError, match=said), distributed():
        pass
    assert found.get("GLOO_SOCKET_IFNAME") == given


SAYS_WHO_IT_IS = """
import os, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
line = " ".join([*sys.argv[1:], *(os.environ[name] for name in names)])
sys.stdout.write(line + "\\n")  # in one piece, beside those of the others
"""
ONE_OF_TWO_MACHINES = """
import os, sys
from megatron_prolong.runtime.processes import start_processes
from megatron_prolong.runtime.rendezvous import Rendezvous
os.chdir(sys.argv[1])  # whose package of our name the processes run
start_processes(["train"], 2, Rendezvous(int(sys.argv[2]), 2, 0, 1, "127.0.0.1", int(sys.argv[3])))
"""
A_MACHINE_ALONE = """
import os, socket, sys
from megatron_prolong.runtime.processes import start_processes
from megatron_prolong.runtime.rendezvous import Rendezvous
socket.getfqdn = lambda name="": "no-such-name.invalid"
os.chdir(sys.argv[1])
start_processes(["train"], 2, Rendezvous(0, 1, 0, 1, "127.0.0.1", 1))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A directory in which the processes run a package of our name that says who they are."""
    (tmp_path / "megatron_prolong").mkdir()
    (tmp_path / "megatron_prolong/__init__.py").touch()
    (tmp_path / "megatron_prolong/__main__.py").write_text(SAYS_WHO_IT_IS)
    return tmp_path


def test_processes_of_a_machine_that_cannot_look_up_its_own_name_meet_all_the_same(stand_in: Path) -> None:
    """As in many containers: they waited five minutes for each other, and failed."""
    command = [sys.executable, "-c", A_MACHINE_ALONE, str(stand_in)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert sorted(said.splitlines()) == [f"train {rank} 2 {rank} 2 localhost" for rank in range(2)]


def test_processes_of_two_machines_are_ranks_of_one_job(stand_in: Path) -> None:
    port = str(read_rendezvous({}).port)
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO_MACHINES, str(stand_in), str(rank), port],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = sorted(line for each in machines for line in each.communicate(timeout=120)[0].splitlines())
    finally:
        for each in machines:
            each.kill()
    assert [each.returncode for each in machines] == [0, 0]
    assert said == [f"train {rank} 4 {rank % 2} 2 127.0.0.1" for rank in range(4)]

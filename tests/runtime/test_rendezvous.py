"""Who a process is: what torchrun and srun say, and what an sbatch script only seems to say."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.errors import UserError
from megatron_prolong.runtime import rendezvous
from megatron_prolong.runtime.rendezvous import Rendezvous, read_rendezvous

BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
"""Slurm describes the whole job to the script, which is one process."""
STEP = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
RECIPE = """\
name: tiny
run_dir: run
model: {init: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_hidden_size: 64, max_length: 64,
  rope_base: 1e4}, tokenizer: .}
stages: [{name: one, sequence_length: 64, batch_tokens: 512, steps: 1, lr: 1e-3, mixture: mock}]
"""


def test_a_batch_script_is_one_process_and_a_step_is_all_of_them() -> None:
    assert read_rendezvous(BATCH_SCRIPT).size == 1
    step = read_rendezvous(STEP)
    assert step == Rendezvous(rank=5, size=8, local_rank=1, local_size=8, address="node1", port=29500)
    assert read_rendezvous({**BATCH_SCRIPT, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}).size == 1
    with pytest.raises(UserError, match="started by srun, but MASTER_ADDR, MASTER_PORT not set"):
        read_rendezvous({**BATCH_SCRIPT, "SLURM_STEP_ID": "0"})


def test_a_process_alone_meets_itself_at_a_port_of_its_own() -> None:
    """So does one in a step that says nothing of tasks."""
    for variables in ({}, {"SLURM_STEP_ID": "0"}, {"RANK": "1"}):
        alone = read_rendezvous(variables)
        assert alone == Rendezvous(0, 1, 0, 1, "127.0.0.1", alone.port)
        with socket.socket() as free:
            free.bind((alone.address, alone.port))


def test_what_a_launcher_other_than_torchrun_leaves_out() -> None:
    with pytest.raises(UserError, match="started by torchrun, but MASTER_ADDR, MASTER_PORT not set"):
        read_rendezvous({"RANK": "1", "WORLD_SIZE": "2"})
    there = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert read_rendezvous(there) == Rendezvous(1, 2, 0, 2, "node1", 29500)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "first"}, "RANK in the environment: found 'first'; must be a whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment: found ''"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK in the environment: found '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT in the environment: found 'http'"),
        ({"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4: ranks are counted from 0"),
        ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE in the environment: found 'all'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK is 0, LOCAL_WORLD_SIZE 0 and WORLD_SIZE 4: they"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK is 0, LOCAL_WORLD_SIZE 8 and WORLD_SIZE 4: they"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2, LOCAL_WORLD_SIZE 2 and"),
    ],
)
def test_what_is_no_place_among_the_ranks_is_named(changed: dict[str, str], said: str) -> None:
    """RANK 4 would wait for ever."""
    variables = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", **changed}
    with pytest.raises(UserError, match=said):
        read_rendezvous(variables)


def test_gloo_is_given_an_interface_that_other_nodes_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the loopback, which this machine's own name often resolves to."""
    routes = {"node1": "127.0.1.1", "192.0.2.1": "10.0.0.7", "node2": "10.1.0.7"}

    class Probe:
        def __init__(self, *_: object) -> None:
            self.target = ""

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, address: tuple[str, int]) -> None:
            if address[0] not in routes:
                raise OSError("no route")
            self.target = address[0]

        def getsockname(self) -> tuple[str, int]:
            return routes[self.target], 0

    monkeypatch.setattr(rendezvous.socket, "socket", Probe)
    addresses = {"lo": "127.0.1.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    interfaces = {name: [SimpleNamespace(address=address)] for name, address in addresses.items()}
    monkeypatch.setattr(rendezvous.psutil, "net_if_addrs", lambda: interfaces)
    found = [rendezvous.interface_towards(name) for name in ("node1", "node2", "no name known here")]
    assert found == ["eth0", "ib0", "eth0"]
    del routes["192.0.2.1"]
    assert rendezvous.interface_towards("node1") is None, "a machine without a network"


@pytest.mark.parametrize(
    ("variables", "processes", "ranks"),
    [
        (BATCH_SCRIPT, 1, 1),
        (STEP, 1, 8),
        ({**STEP, "WORLD_SIZE": "4"}, 1, 4),
        (BATCH_SCRIPT, 2, 2),
        (STEP, 2, 16),
    ],
)
def test_a_check_is_for_as_many_ranks_as_would_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], processes: int, ranks: int
) -> None:
    """WORLD_SIZE alone asks about a job that is still to be started."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = CliRunner().invoke(app, ["train", "recipe.yaml", "--check", "--processes", str(processes)])
    assert f"ready for {ranks} rank(s)" in found.output, found.exception

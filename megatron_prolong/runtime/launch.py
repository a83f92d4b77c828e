"""Start torch.distributed the same way under torchrun, under Slurm's srun, or with no launcher at all.

NCCL when CUDA is there, gloo on CPU. One process per device; this module knows nothing of models or recipes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prolong.errors import UserError


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes run files."""
        return self.rank == 0


@dataclass(frozen=True)
class Rendezvous:
    """What the launcher said: who we are and where the first process listens."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def read_rendezvous(environment: Mapping[str, str]) -> Rendezvous:
    """Read the launcher's variables: torchrun's, else srun's, else a world of one process.

    Raises:
        UserError: the variables of a launcher are there but incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_variables(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun")
    # An interactive salloc shell has SLURM_JOB_ID too; only a job step (srun) has a step id and tasks.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return _from_variables(environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "srun")
    return Rendezvous(0, 1, 0, "127.0.0.1", _free_port())


def _from_variables(
    environment: Mapping[str, str], rank: str, size: str, local_rank: str, launcher: str
) -> Rendezvous:
    needed = [rank, size, "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise UserError(
            f"started by {launcher}, but {', '.join(missing)} not set: start with torchrun, or export "
            "MASTER_ADDR and MASTER_PORT of the first node before srun"
        )
    return Rendezvous(
        rank=int(environment[rank]),
        size=int(environment[size]),
        local_rank=int(environment.get(local_rank, "0")),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def distributed(timeout_seconds: float = 600.0) -> Iterator[World]:
    """Initialise the default process group, yield this process's place in it, and leave cleanly.

    Args:
        timeout_seconds: a collective that waits longer than this fails on every rank, so that one dead rank
            never leaves the others hanging.
    """
    place = read_rendezvous(os.environ)
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {place.local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}; start one process per GPU"
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        _share_cores(place)
    dist.init_process_group(
        backend,
        init_method=f"tcp://{place.address}:{place.port}",
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    yield World(place.rank, place.size, place.local_rank, device)
    # Reached only without an error: a failed rank must not wait for the others in a tidy shutdown,
    # its death is their signal.
    dist.destroy_process_group()


def _share_cores(place: Rendezvous) -> None:
    """Divide the machine's cores among the local processes unless the user has set OMP_NUM_THREADS."""
    if place.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", place.size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))

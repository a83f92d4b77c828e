"""Start torch.distributed the same way under torchrun, under Slurm's srun, or with no launcher at all.

NCCL when CUDA is there, gloo on CPU. One process per device; this module knows nothing of models or recipes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_prolong.errors import JointError, UserError
from megatron_prolong.runtime.cores import usable_cores
from megatron_prolong.runtime.flash_attention_3 import use_flash_attention_3
from megatron_prolong.runtime.gpu_environment import set_gpu_environment
from megatron_prolong.runtime.lost_rank import naming_lost_ranks
from megatron_prolong.runtime.open_files import allow_open_files
from megatron_prolong.runtime.orphans import follow_launcher
from megatron_prolong.runtime.rendezvous import Rendezvous, interface_towards, read_number, read_rendezvous
from megatron_prolong.runtime.watchdog import HANG_SECONDS

FEWEST_OPEN_FILES = 512  # a single process of the smallest model has 93 open
_GROUPS_OF_ALL = 3  # that hold every rank: the default one and two of Megatron's
_MEETING = timedelta(minutes=30)  # a node may be slow to start
# A collective that waits longer fails on every rank, so that one that is gone without a word never leaves the
# others hanging. Beyond the watchdog's patience: only the rank that hangs knows where.
GROUP_TIMEOUT = timedelta(seconds=HANG_SECONDS) + timedelta(minutes=10)


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


@contextmanager
def distributed() -> Iterator[World]:
    """Initialise the default process group, yield this process's place in it, and leave cleanly."""
    set_gpu_environment()  # of programs other than `prolong`, which has done so earlier
    place = read_rendezvous(os.environ)
    refuse_few_open_files(_GROUPS_OF_ALL * (place.size - 1))
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {place.local_rank} has no GPU of its own: this machine shows "
                f"{torch.cuda.device_count()}; start one process per GPU"
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        use_flash_attention_3()
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    _share_cores(place)
    # srun does not say how many of the ranks are on this machine.
    several_machines = place.size > place.local_size or read_number(os.environ, "SLURM_NNODES", 1) > 1
    if several_machines and (interface := interface_towards(place.address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    _meet(backend, place)
    follow_launcher(signal.SIGTERM)  # from now on there may be something to save
    with naming_lost_ranks(place.rank, lambda: "a collective"):
        try:
            yield World(place.rank, place.size, place.local_rank, device)
        except BaseException as error:
            # A rank that fails alone must not wait for the others in a tidy shutdown: its death is their signal.
            if place.size == 1 or isinstance(error, JointError | SystemExit):
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _meet(backend: str, place: Rendezvous) -> None:
    """Find the other ranks.

    Raises:
        UserError: the port is taken, the first node is not found, or a rank does not come.
    """
    try:
        url = f"tcp://{place.address}:{place.port}"
        store, rank, size = next(rendezvous(url, place.rank, place.size, timeout=_MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # ValueError: a port beyond 65535
        said = str(error).splitlines()[0]
        hint = (
            "; set GLOO_SOCKET_IFNAME to the network interface between the nodes"
            if "gloo" in said.lower()
            else ""
        )
        raise UserError(
            f"rank {place.rank} of {place.size} could not meet the others at MASTER_ADDR {place.address}, "
            f"MASTER_PORT {place.port}: {said}{hint}"
        ) from error


def refuse_few_open_files(sockets: int) -> None:
    """gloo keeps a socket to every rank in every group of ranks.

    Raises:
        UserError: a process may open too few; PyTorch would end with an error of its own, or wait for ever.
    """
    fewest = FEWEST_OPEN_FILES + sockets
    if (most := allow_open_files()) < fewest:
        raise UserError(
            f"a process may open {most} files here; training takes at least {fewest} (sockets to all ranks and "
            f"shards are files): raise the limit in a new shell (ulimit -n {max(4096, 2 * fewest)}), or have it "
            "raised"
        )


def _share_cores(place: Rendezvous) -> None:
    """Divide the job's cores among the local processes unless the user has set OMP_NUM_THREADS."""
    if place.size == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    cores = usable_cores()
    # srun may have given each of its tasks cores of its own.
    has_own = "LOCAL_WORLD_SIZE" not in os.environ and cores < (os.cpu_count() or 1)
    torch.set_num_threads(cores if has_own else max(1, cores // place.local_size))

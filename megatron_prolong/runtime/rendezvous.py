"""Who this process is among those of the job, and where they meet: what torchrun or srun says. Needs no torch."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from megatron_prolong.errors import UserError


@dataclass(frozen=True)
class Rendezvous:
    """What the launcher said: who we are and where the first process listens.

    local_size: processes on this machine; all, where the launcher does not say (srun).
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def read_rendezvous(environment: Mapping[str, str]) -> Rendezvous:
    """Read the launcher's variables: torchrun's, else srun's, else a world of one process.

    Raises:
        UserError: the variables of a launcher are there but incomplete, or no place among the ranks.
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_variables(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun")
    # An interactive salloc shell has SLURM_JOB_ID too; only a job step (srun) has a step id and tasks.
    if "SLURM_STEP_ID" in environment and read_number(environment, "SLURM_NTASKS", 1) > 1:
        return _from_variables(environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "srun")
    return Rendezvous(0, 1, 0, 1, "127.0.0.1", _free_port())


def read_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """The whole number in a variable; raises UserError when it holds something else."""
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"{name} in the environment: found {text!r}; must be a whole number (or unset it)")
    return int(text)


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
    place = Rendezvous(
        rank=read_number(environment, rank, 0),
        size=read_number(environment, size, 1),
        local_rank=read_number(environment, local_rank, 0),
        local_size=read_number(environment, "LOCAL_WORLD_SIZE", read_number(environment, size, 1)),
        address=environment["MASTER_ADDR"],
        port=read_number(environment, "MASTER_PORT", 0),
    )
    if place.rank >= place.size:
        raise UserError(f"{rank} is {place.rank}, but {size} is {place.size}: ranks are counted from 0")
    if not place.local_rank < place.local_size <= place.size:
        raise UserError(
            f"{local_rank} is {place.local_rank}, LOCAL_WORLD_SIZE {place.local_size} and {size} {place.size}: "
            "they count this process among those of its machine, these, and all"
        )
    return place


def interface_towards(address: str) -> str | None:
    """The network interface that leads to `address`; where that is this machine, the one of the default route.

    None where there is none. Gloo left alone takes what the machine's own name resolves to, on many the loopback.
    """
    for target in (address, "192.0.2.1"):  # of a range kept for documentation; nothing is sent
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                own = probe.getsockname()[0]
        except OSError:
            continue
        if not ipaddress.ip_address(own).is_loopback:
            interfaces = psutil.net_if_addrs().items()
            return next((name for name, of in interfaces if own in (entry.address for entry in of)), None)
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

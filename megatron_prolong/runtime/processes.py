"""Start the processes of one machine through torch's elastic agent, and end as they ended."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.numa.binding import AffinityMode, NumaOptions

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.rendezvous import Rendezvous
from megatron_prolong.runtime.signals import STOP_SIGNALS

# Torch's 10 minutes are too few where one node has the container's image and another has to fetch it first.
MEETING_SECONDS = 1800


def start_processes(command: Sequence[str], count: int, machine: Rendezvous) -> None:
    """Run `prolong COMMAND` in `count` processes here; returns when all have succeeded.

    As torchrun does, with three differences. The process that failed says what failed, without fifty lines of
    report on it. The exit code is that of the first process that failed. Stop signals are passed on, and the
    processes may take as long as they need to save: torchrun would kill them after 30 s.

    Args:
        machine: the place of this machine among those that start processes together, one launcher on each.

    Raises:
        SystemExit: with the exit code of the first process that failed, 128 + N for one that signal N ended.
        UserError: the machines do not find each other.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _pass_on)
    logging.disable()
    try:
        elastic_launch(_config(count, machine), sys.executable)("-u", "-m", "megatron_prolong", *command)
    except ChildFailedError as failed:
        _exit(failed)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except dist.DistError as error:
        raise UserError(
            f"node {machine.rank} of {machine.size} could not meet the others at MASTER_ADDR {machine.address}, "
            f"MASTER_PORT {machine.port}: {str(error).splitlines()[0]}"
        ) from error


def _pass_on(number: int, _: object) -> None:
    children = psutil.Process().children()
    if not children:  # none is started yet: nobody would stop, and nothing is to be saved
        sys.exit(128 + number)
    for child in children:
        child.send_signal(number)


def _config(count: int, machine: Rendezvous) -> LaunchConfig:
    alone = machine.size == 1
    return LaunchConfig(
        min_nodes=machine.size,
        max_nodes=machine.size,
        nproc_per_node=count,
        run_id="prolong",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else f"{machine.address}:{machine.port}",
        rdzv_configs={"rank": machine.rank, "timeout": MEETING_SECONDS},
        # Torch would send them to this machine's own name, which in a container often leads nowhere.
        local_addr="localhost" if alone else None,
        # Memory that the GPU copies to and from should be on its side of the machine.
        numa_options=NumaOptions(AffinityMode.NODE, True) if torch.cuda.is_available() else None,
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )


def _exit(failed: ChildFailedError) -> NoReturn:
    rank, failure = failed.get_first_failure()
    for other, found in failed.failures.items():
        # Seen to fail at the same time: a killed one is why the first lost it. (SIGTERM is the launcher's own.)
        killed = found.exitcode < 0 and found.exitcode != -signal.SIGTERM
        if failure.exitcode == 1 and killed and found.timestamp == failure.timestamp:
            rank, failure = other, found
    if failure.exitcode > 0:
        sys.exit(failure.exitcode)
    print(f"error: rank {rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
    sys.exit(128 - failure.exitcode)

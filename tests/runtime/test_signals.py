"""The first signal asks, the second ends; all ranks agree on the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_prolong.runtime.signals import STOP_SIGNALS, StopRequest, stop_requests


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.agreed()
        assert request.received == number
    assert signal.getsignal(number) == before


def test_the_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from megatron_prolong.runtime.signals import stop_requests\n"
        "with stop_requests():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n"
    assert done.returncode == 128 + signal.SIGTERM


def _asked_on_rank_1(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    request = StopRequest()
    assert not request.agreed()
    if rank == 1:
        request.received = signal.SIGTERM
    assert request.agreed()  # on both ranks
    dist.destroy_process_group()


def test_one_rank_asked_stops_all(tmp_path):
    torch.multiprocessing.spawn(_asked_on_rank_1, (str(tmp_path / "store"),), nprocs=2)

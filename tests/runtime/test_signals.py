"""The first signal asks, a later one ends; all ranks agree on the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from megatron_prolong.runtime import signals
from megatron_prolong.runtime.signals import STOP_SIGNALS, StopRequest, stop_requests
from tests.ranks import run_ranks


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert not request.agreed()
        os.kill(os.getpid(), number)
        assert request.agreed()
        assert request.received == number
    assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1, "later signals would be written into whatever has this number then"
    for thread in [one for one in threading.enumerate() if one.name == "signals"]:
        thread.join(timeout=60)
        assert not thread.is_alive(), "which listens to nothing any more"


def test_only_signals_to_stop_end_the_process_also_where_others_come_with_them(monkeypatch):
    """Ctrl-C is the interpreter's, which writes it into the pipe too."""
    reader, writer = os.pipe()
    os.write(writer, bytes([signal.SIGINT, signal.SIGTERM]))
    os.close(writer)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals, "_SAME_REQUEST_SECONDS", 0)
    signals._exit_on_the_second(reader)
    assert ended == [128 + signal.SIGTERM]
    with pytest.raises(OSError):
        os.fstat(reader)


def test_a_signal_that_comes_twice_is_one_request_and_a_later_one_ends_the_process():
    """srun tells every process, and so may a launcher among them: that must not end the save."""
    program = (
        "import os, signal, time\n"
        "from megatron_prolong.runtime import signals\n"
        "signals._SAME_REQUEST_SECONDS = 1\n"
        "with signals.stop_requests():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1)\n"
        "    print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n"
    assert done.returncode == 128 + signal.SIGTERM


IN_A_COLLECTIVE = """
import sys, time
import torch.distributed as dist
from megatron_prolong.runtime import signals
signals._SAME_REQUEST_SECONDS = 0.5
rank = int(sys.argv[1])
with signals.stop_requests():
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    print("ready", flush=True)
    time.sleep(600) if rank else dist.barrier()
"""


def test_the_second_signal_ends_a_process_that_hangs_in_a_collective(tmp_path):
    """Where the main thread runs no handlers, and the first signal is never noticed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_COLLECTIVE, str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [process.stdout.readline() for process in ranks] == ["ready\n"] * 2
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(1)
        assert ranks[0].poll() is None
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


STILL_WAITING_FOR_OTHER_MACHINES = """
import os, signal
from megatron_prolong.runtime import processes, rendezvous
processes.elastic_launch = lambda *_: lambda *_: os.kill(os.getpid(), signal.SIGTERM)
processes.start_processes([], 2, rendezvous.read_rendezvous({}))
"""


def test_a_signal_before_the_processes_are_started_ends_their_launcher():
    """It went to no one, and training began."""
    done = subprocess.run([sys.executable, "-c", STILL_WAITING_FOR_OTHER_MACHINES], timeout=120)
    assert done.returncode == 128 + signal.SIGTERM


def _asked_on_rank_1() -> None:
    request = StopRequest()
    assert not request.agreed()
    if dist.get_rank() == 1:
        request.received = signal.SIGTERM
    assert request.agreed()  # on both ranks


def test_one_rank_asked_stops_all():
    run_ranks(2, _asked_on_rank_1)

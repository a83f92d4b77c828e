"""Ranks that stay alive between test cases, so that a property test can run hundreds of collective cases.

The parent draws (and shrinks) examples; every rank of the pool runs the same function on them. A rank that
raises makes the case fail in the parent with its traceback, and the pool is started anew.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_prolong.runtime.flash_attention_3 import use_flash_attention_3

TIMEOUT_SECONDS = 180


class RankPool:
    """`size` processes of one world, on CPU with gloo or each on a GPU of its own with NCCL.

    Functions must be module-level; called as function(rank, *args).
    """

    def __init__(self, size: int, on_gpus: bool = False) -> None:
        self.size = size
        self._on_gpus = on_gpus
        self._processes: list[Any] = []
        self._pipes: tuple[Any, ...] = ()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of all ranks, in order. Return numpy arrays or plain data."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_SECONDS):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_SECONDS} s")
            error, result = pipe.recv()
            if error:
                self.close()
                raise AssertionError(f"rank {rank} failed:\n{error}")
            replies.append(result)
        return replies

    def close(self) -> None:
        """Ends the processes; the next `run` starts new ones."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)  # an orderly end: saving a checkpoint leaves a child of its own
            process.join(2)
            process.kill()
            process.join()
        self._processes, self._pipes = [], ()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        self._pipes, ends = zip(*(context.Pipe() for _ in range(self.size)), strict=True)
        self._processes = [
            context.Process(target=_serve, args=(rank, self.size, self._on_gpus, str(store), end))
            for rank, end in enumerate(ends)
        ]
        for process in self._processes:
            process.start()


def _serve(rank: int, size: int, on_gpus: bool, store: str, pipe: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
        use_flash_attention_3()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    while (call := pipe.recv()) is not None:
        function, args = call
        try:
            pipe.send((None, function(rank, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The process group of these ranks, made once. Every rank of the world must ask for the same in turn."""
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(list(ranks))
    return _groups[ranks]

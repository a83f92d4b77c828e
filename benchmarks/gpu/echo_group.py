"""A process group of many ranks in one process: the others send what this one sends.

For timing one rank of many on one GPU. Every tensor has the numbers that it would have if all ranks had the same
work, so kernels run on data as they would; what is missing is the time of the messages. (PyTorch's own fake group
leaves what is received uninitialised.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future


def _for_each(one: Callable[..., dist.Work]) -> Callable[..., dist.Work]:
    """A collective of a pair of tensors as one of many pairs."""

    def many(self: EchoGroup, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            one(self, output, own)
        return _done()

    return many


class EchoGroup(dist.ProcessGroup):
    """The collectives that a training step needs; the names are those that torch.distributed calls."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size = rank, size
        self._sent: deque[Tensor] = deque()
        self._awaited: deque[Tensor] = deque()

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "echo"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names.get(self, "")

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        if opts.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.detach().mul_(self._size)
        return _done()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return _done()

    def _allgather_base(self, output: Tensor, mine: Tensor, opts: Any = None) -> dist.Work:
        # This rank's own part may lie in the output already; it is copied onto itself then.
        for part in output.detach().view(self._size, -1):
            part.copy_(mine.detach().flatten())
        return _done()

    def allgather(self, outputs: list[list[Tensor]], mine: list[Tensor], opts: Any = None) -> dist.Work:
        for parts, own in zip(outputs, mine, strict=True):
            for part in parts:
                part.detach().copy_(own)
        return _done()

    def _reduce_scatter_base(self, output: Tensor, parts: Tensor, opts: Any = None) -> dist.Work:
        mine = parts.detach().view(self._size, -1)[self._rank]
        output.detach().copy_(mine.view_as(output)).mul_(self._size)
        return _done()

    def alltoall_base(
        self, output: Tensor, parts: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> dist.Work:
        assert not output_sizes and not input_sizes, "parts are equal"
        mine = parts.detach().view(self._size, -1)[self._rank]
        output.detach().view(self._size, -1).copy_(mine.expand(self._size, -1))
        return _done()

    allgather_into_tensor_coalesced = _for_each(_allgather_base)
    reduce_scatter_tensor_coalesced = _for_each(_reduce_scatter_base)

    # The same under the names of PyTorch 2.13.
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def _get_backend(self, device: Any) -> EchoGroup:  # PyTorch 2.14 asks it whether messages can go together
        return self

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        self._sent += tensors
        return self._deliver()

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> dist.Work:
        self._awaited += tensors
        return self._deliver()

    def _deliver(self) -> dist.Work:
        while self._sent and self._awaited:
            self._awaited.popleft().detach().copy_(self._sent.popleft().detach())
        return _done()


def _done() -> dist.Work:
    future: Future[None] = Future()
    future.set_result(None)
    return _create_work_from_future(future)


def join(rank: int, size: int) -> None:
    """Make the default process group one of `size` ranks, of which this process is one."""
    dist.Backend.register_backend(
        "echo", lambda store, rank, size, timeout: EchoGroup(rank, size), devices=["cpu", "cuda"]
    )
    dist.init_process_group("echo", store=dist.HashStore(), rank=rank, world_size=size)

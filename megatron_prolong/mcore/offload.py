"""Activations wait for their backward pass in host memory: what does not fit on the GPU costs a trip over PCIe.

What autograd saves is copied to pinned memory on a stream of its own while the forward goes on, and back ahead of
the backward, which asks for it in reverse. With full recomputation that is one residual stream per layer, which a
layer's computation hides from tens of thousands of tokens on. Weights and small tensors stay where they are. What
several nodes save travels once: the rotary angles of all layers, an attention's output that the next product takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 2**20  # smaller ones are not worth a transfer
AHEAD_BYTES = 2**30  # on their way back before the backward asks: a fraction of a layer at 512K tokens
LEAVING_BYTES = 2**32  # on their way to the host: 0.1 s over PCIe, in which the GPU has work enough


@dataclass
class Parked:
    """A tensor in host memory.

    Attributes:
        device: where it belongs.
        before: what the same forward pass parked before it, which the backward needs next.
        saved_by: so many nodes that have not asked for it yet.
        back: the tensor on its device again, from when it is on its way until the last node has it.
        fetched: the backward has asked for it. A node asks for what it saved from first to last: the one before may
            have come already.
    """

    host: Tensor
    device: torch.device
    before: Parked | None
    saved_by: int = 0
    back: Tensor | None = None
    fetched: bool = False
    arrived: torch.cuda.Event | None = None


class HostOffload(saved_tensors_hooks):
    """A context: what a forward pass inside it saves for backward is parked in host memory.

    Args:
        chunks: the modules of this rank; their weights are never moved.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], min_bytes: int = MIN_BYTES) -> None:
        super().__init__(self._park, self._fetch)
        self.num_parked_bytes = 0
        self._min_bytes = min_bytes
        # Weights may be views of one buffer: their storage tells them, also when a slice of one is saved.
        weights = [weight for chunk in chunks for weight in chunk.parameters()]
        self._weights = {w.untyped_storage().data_ptr() for w in weights if not is_float8tensor(w)}
        self._copies = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._leaving: deque[tuple[torch.cuda.Event, int]] = deque()
        self._last: Parked | None = None
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, Parked]] = {}

    def __exit__(self, *error: object) -> None:
        self._last = None  # the next forward pass has a backward of its own
        self._known.clear()
        super().__exit__(*error)

    def _park(self, tensor: Tensor) -> Tensor | tuple[Parked, torch.Size]:
        if is_float8tensor(tensor):  # a weight: Transformer Engine saves activations as plain bytes
            return tensor
        if tensor.nbytes < self._min_bytes or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        storage = StorageWeakRef(tensor.untyped_storage())
        layout = () if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        key = (tensor.data_ptr(), tensor.nbytes, tensor.dtype, tensor._version, layout)
        known = self._known.get(key)
        if known is None or known[0].expired():  # its memory is another tensor's by now
            known = self._known[key] = storage, self._send(tensor)
        known[1].saved_by += 1
        return known[1], tensor.shape

    def _send(self, tensor: Tensor) -> Parked:
        self.num_parked_bytes += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._copies is not None)  # strides kept
        self._copy(tensor, host)
        if self._copies is not None:
            tensor.record_stream(self._copies)  # its memory is free after the copy, not before
            self._wait_for_copies(tensor.nbytes)
        self._last = Parked(host, tensor.device, self._last)
        return self._last

    def _wait_for_copies(self, num_bytes: int) -> None:
        """The host queues work far ahead of the GPU: without a limit it would hand out new memory for all of it
        before one copy is done."""
        assert self._copies is not None
        self._leaving.append((self._copies.record_event(), num_bytes))
        while sum(size for _, size in self._leaving) > LEAVING_BYTES:
            self._leaving.popleft()[0].synchronize()

    def _fetch(self, saved: Tensor | tuple[Parked, torch.Size]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        parked, shape = saved
        self._bring(parked)
        parked.fetched = True
        ahead, next_one = 0, parked.before
        while next_one is not None and ahead < AHEAD_BYTES:
            if not next_one.fetched:
                self._bring(next_one)
                ahead += next_one.host.nbytes
            next_one = next_one.before
        if parked.arrived is not None:
            torch.cuda.current_stream().wait_event(parked.arrived)
        assert parked.back is not None
        tensor = parked.back.view(shape)
        parked.saved_by -= 1
        if parked.saved_by <= 0:
            parked.back = None
        return tensor

    def _bring(self, parked: Parked) -> None:
        if parked.back is None:
            parked.back = torch.empty_like(parked.host, device=parked.device)
            self._copy(parked.host, parked.back)
            parked.arrived = self._copies.record_event() if self._copies is not None else None

    def _copy(self, source: Tensor, target: Tensor) -> None:
        """On the stream of the copies, behind what is computed so far."""
        if self._copies is None:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

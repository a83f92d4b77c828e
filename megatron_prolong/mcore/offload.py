"""Activations wait for their backward pass in host memory: what does not fit the GPU costs a way over PCIe.

What autograd saves is copied to pinned memory on a stream of its own while the forward goes on, and back when the
backward asks. With full recomputation that is one residual stream per layer, which a layer's computation hides from
tens of thousands of tokens on. Weights and small tensors stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 2**20  # smaller ones are not worth a transfer


@dataclass(frozen=True)
class Parked:
    """A tensor in host memory, and where it belongs."""

    host: Tensor
    device: torch.device


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

    def _park(self, tensor: Tensor) -> Tensor | Parked:
        if is_float8tensor(tensor):  # a weight: Transformer Engine saves activations as plain bytes
            return tensor
        if tensor.nbytes < self._min_bytes or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        self.num_parked_bytes += tensor.nbytes
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._copies is not None)  # strides kept
        if self._copies is None:
            host.copy_(tensor)
        else:
            self._copies.wait_stream(torch.cuda.current_stream())  # until the tensor is computed
            with torch.cuda.stream(self._copies):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copies)  # its memory is free after the copy, not before
        return Parked(host, tensor.device)

    def _fetch(self, parked: Tensor | Parked) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        if self._copies is not None:
            torch.cuda.current_stream().wait_stream(self._copies)
        return parked.host.to(parked.device, non_blocking=True)

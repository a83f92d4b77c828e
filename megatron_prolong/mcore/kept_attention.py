"""Layers are recomputed, their attention is not: its output waits for the backward pass.

At 512K tokens attention is most of a layer's work, and its result is one residual stream. The first pass through a
recomputed layer runs attention with a graph of its own, in which queries, keys and values are left out; the layer
recomputes them. The second pass takes the output from there, and its backward walks that graph with the recomputed
tensors put in. It asks nothing of the kernels, so Transformer Engine's and its exchanges are kept alike (torch's
selective checkpointing, which torchtitan uses for this, sees only operators of torch's dispatcher).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

LeftOut = tuple[int, torch.Size, tuple[int, ...], int]
"""Which of query, key and value, and the view of it: size, stride, offset from its beginning."""


class KeptAttention:
    """One call of attention between the two passes through its layer.

    Args:
        attend: query, key and value -> outputs; may exchange with other ranks, forward and backward.
        inputs: query, key and value; not kept.
    """

    def __init__(self, attend: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self._inputs = inputs
        with torch.enable_grad(), saved_tensors_hooks(self._leave_out, self._put_in):
            anchor = torch.empty(0, device=inputs[0].device, requires_grad=True)
            started = _Start.apply(anchor, *inputs)
            self._outs = attend(*started)
        self._edges = [get_gradient_edge(tensor) for tensor in started]
        self._strides = [tensor.stride() for tensor in inputs]
        self._inputs = ()

    @property
    def outs(self) -> tuple[Tensor, ...]:
        """Attention's outputs, without a graph."""
        return tuple(out.detach() for out in self._outs)

    def again(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, as functions of the recomputed query, key and value."""
        assert [tensor.stride() for tensor in inputs] == self._strides, "recomputed in another memory layout"
        outs: tuple[Tensor, ...] = _Continue.apply(self, *inputs)
        return outs

    def gradients(self, douts: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of query, key and value, once."""
        self._inputs = inputs
        return torch.autograd.grad(self._outs, self._edges, douts)

    def _leave_out(self, tensor: Tensor) -> Tensor | LeftOut:
        for index, whole in enumerate(self._inputs):
            if tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                offset = int(tensor.storage_offset() - whole.storage_offset())
                return index, tensor.size(), tensor.stride(), offset
        return tensor

    def _put_in(self, saved: Tensor | LeftOut) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        index, size, stride, offset = saved
        whole = self._inputs[index]
        return whole.as_strided(size, stride, whole.storage_offset() + offset)


class _Start(torch.autograd.Function):
    """Tensors that a graph begins with and does not hold, unlike leaves."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        raise AssertionError("gradients are taken at this node's outputs")


class _Continue(torch.autograd.Function):
    """Kept outputs in the graph of the layer that is being recomputed."""

    @staticmethod
    def forward(ctx: Any, kept: KeptAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.kept = kept
        ctx.save_for_backward(*inputs)
        return kept.outs

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.kept.gradients(douts, ctx.saved_tensors))

"""What a rank of our own program really holds: run by the ranks of a pool (tests/distributed/rank_pool.py)."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.recipe.shape import ModelShape


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank. `activations` is the most that was saved when a forward had just ended; `sent` is by
    kind of collective, as a ring sends them."""

    pp_rank: int
    sent: dict[str, float]
    parameters: int
    gradients: int
    optimizer: int
    activations: int


class SavedTensors:
    """Counts the storages that autograd keeps for the backward, each once, without the `excluded` ones."""

    def __init__(self, excluded: set[int]) -> None:
        self.excluded = excluded
        self.live: dict[int, tuple[int, int]] = {}  # address → (bytes, references)

    def pack(self, tensor: torch.Tensor) -> Any:
        """Hook for torch.autograd.graph.saved_tensors_hooks."""
        held = _Held(tensor)
        self.watch(held, tensor)
        return held

    def watch(self, owner: object, tensor: torch.Tensor) -> None:
        """Count `tensor` as long as `owner` lives."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self.excluded and address:
            size, references = self.live.get(address, (storage.nbytes(), 0))
            self.live[address] = (size, references + 1)
            weakref.finalize(owner, self._release, address)

    @staticmethod
    def unpack(held: Any) -> torch.Tensor:
        """The other hook."""
        return held.tensor

    def _release(self, address: int) -> None:
        size, references = self.live[address]
        if references == 1:
            del self.live[address]
        else:
            self.live[address] = (size, references - 1)

    @property
    def total(self) -> int:
        """Bytes held now."""
        return sum(size for size, _ in self.live.values())


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Traffic:
    """Counts what this rank sends, by wrapping the process group's own methods."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = defaultdict(float)
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Traffic:
        for name, bytes_sent in _BYTES_SENT.items():
            if name not in vars(dist.ProcessGroup):
                continue  # another PyTorch's name
            self._originals[name] = vars(dist.ProcessGroup)[name]
            counted = self._counted(name, getattr(dist.ProcessGroup, name), bytes_sent)
            setattr(dist.ProcessGroup, name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)

    def _counted(self, name: str, original: Any, bytes_sent: Any) -> Any:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            self.sent[name] += bytes_sent(args, group.size())
            return original(group, *args, **kwargs)

        return call


def _size(tensors: Any) -> int:
    if torch.is_tensor(tensors):
        return tensors.numel() * tensors.element_size()
    return sum(_size(one) for one in tensors)


_BYTES_SENT = {
    "allreduce": lambda args, n: 2 * (n - 1) / n * _size(args[0]),
    "allreduce_coalesced": lambda args, n: 2 * (n - 1) / n * _size(args[0]),
    "all_gather_single": lambda args, n: (n - 1) / n * _size(args[0]),
    "all_gather_single_coalesced": lambda args, n: (n - 1) / n * _size(args[0]),
    "reduce_scatter_single": lambda args, n: (n - 1) / n * _size(args[1]),
    "reduce_scatter_single_coalesced": lambda args, n: (n - 1) / n * _size(args[1]),
    "all_to_all_single": lambda args, n: (n - 1) / n * _size(args[1]),
    "_allgather_base": lambda args, n: (n - 1) / n * _size(args[0]),  # as PyTorch 2.11 calls them
    "_reduce_scatter_base": lambda args, n: (n - 1) / n * _size(args[1]),
    "allgather_into_tensor_coalesced": lambda args, n: (n - 1) / n * _size(args[0]),
    "reduce_scatter_tensor_coalesced": lambda args, n: (n - 1) / n * _size(args[1]),
    "alltoall_base": lambda args, n: (n - 1) / n * _size(args[1]),
    "allgather": lambda args, n: (n - 1) / n * _size(args[0]),
    "reduce_scatter": lambda args, n: (n - 1) / n * _size(args[1]),
    "send": lambda args, n: _size(args[0]),
    "broadcast": lambda args, n: _size(args[0]),
}


def measure(
    rank: int, shape: ModelShape, layout: Layout, precision: str, recompute: str, length: int, sequences: int
) -> Measured:
    """One step of training at a layout, as training/stage.py makes it, on whole documents."""
    from megatron_prolong.mcore import attention
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.runtime.replace import replaced
    from megatron_prolong.training.balance import micro_batches, share_out
    from megatron_prolong.training.step import train_step

    class WatchedAttention(attention.KeptAttention):
        """Its hooks are in front of those of a step."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for out in self.outs:
                saved.watch(self, out)

        def _leave_out(self, tensor: torch.Tensor) -> Any:
            left = super()._leave_out(tensor)
            return saved.pack(left) if isinstance(left, torch.Tensor) else left

        def _put_in(self, held: Any) -> torch.Tensor:
            return super()._put_in(saved.unpack(held) if isinstance(held, _Held) else held)

    spec, cpu = OptimizerSpec(), torch.device("cpu")
    with megatron(layout, seed=1) as groups:
        model = build_model(shape, layout, precision=precision, recompute=recompute, loss_chunk_tokens=32)
        optimizer = build_optimizer(model, spec, layout, lr=1e-3)
        weights = {
            p.untyped_storage().data_ptr(): p.untyped_storage() for c in model.chunks for p in c.parameters()
        }
        packs = list(_packs(shape, length, sequences))
        assignment = share_out(packs, groups, length, CostModel.for_shape(shape))
        batches = micro_batches(packs, assignment, groups, layout, cpu)
        inputs = [t for batch in batches for t in (batch.tokens, batch.labels, batch.positions)]
        saved = SavedTensors({*weights, *(t.untyped_storage().data_ptr() for t in inputs)})
        peaks = []

        outputs: list[weakref.ref[torch.Tensor]] = []  # what Megatron freed is alive too, with one element

        def after_forward(chunk: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            outputs.append(weakref.ref(output))
            held = [one.untyped_storage().nbytes() for one in (ref() for ref in outputs) if one is not None]
            peaks.append(saved.total + sum(held))

        for chunk in model.bare_chunks:
            chunk.register_forward_hook(after_forward)
        traffic, hooks = Traffic(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with traffic, hooks, replaced([(attention, "KeptAttention", WatchedAttention)]):
            train_step(model, optimizer, batches, groups, spec=spec, lr=1e-3)
        gradients = {
            p.main_grad.untyped_storage().data_ptr(): p.main_grad.untyped_storage().nbytes()
            for c in model.chunks for p in c.parameters()
        }  # fmt: skip
        return Measured(
            pp_rank=groups.pp.rank,
            sent=dict(traffic.sent),
            parameters=sum(storage.nbytes() for storage in weights.values()),
            gradients=sum(gradients.values()),
            optimizer=_optimizer_bytes(optimizer, set(weights)),
            activations=max(peaks) + sum(t.untyped_storage().nbytes() for t in inputs),
        )


def _packs(shape: ModelShape, length: int, sequences: int) -> Iterator[PackedSequence]:
    random = np.random.default_rng(0)
    for index in range(sequences):
        tokens = random.integers(0, shape.vocab_size, length).astype(np.uint32)
        yield PackedSequence(tokens, np.array([0, length]), None, Identity("measured", "-", index))


def _optimizer_bytes(optimizer: Any, weights: set[int]) -> int:
    """Moments, and fp32 copies of weights where they are not the weights themselves."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    total = 0
    for one in inner:
        adam = one.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in weights:
                    total += parameter.numel() * parameter.element_size()
        for state in adam.state.values():
            total += sum(
                t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t) and t.dim()
            )
    return total

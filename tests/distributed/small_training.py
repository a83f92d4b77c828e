"""Eight training steps at any layout, as ranks of a pool run them: shared by the tests that compare layouts.

The global batches' documents straddle every boundary: single tokens, documents shorter than 2·cp, documents of a
whole pack, a pack of single tokens, loss masks, and one batch in which a single token has a loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.distributed_c10d import _world

from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.recipe.fp8 import TOKEN_MULTIPLE, Fp8Recipe
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.recipe.shape import MANIFEST, read_shape

SEQUENCE_LENGTH, NUM_SEQUENCES, NUM_STEPS, VOCAB_SIZE = 64, 4, 8, 130
# Attention so dear that documents are worth splitting at these lengths.
COST = CostModel(linear=1.0, quadratic=0.1)


@dataclass(frozen=True)
class Trained:
    """What one rank reports: numbers of each step, how context parallelism met its documents (split over ranks,
    or local to one), and its parts of the final weights."""

    losses: list[float]
    grad_norms: list[float]
    num_targets: list[int]
    num_split_documents: int
    num_local_documents: int
    shards: list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]


def batches() -> list[list[PackedSequence]]:
    """The global batches of all steps."""
    random = np.random.default_rng(0)
    packs = [
        [64],
        [1] * 64,
        [1, 62, 1],
        [3, 61],
        [5, 1, 2, 40, 16],
        [33, 31],
        [17, 17, 17, 13],
        [63, 1],
        [2, 3, 5, 7, 11, 13, 17, 6],
    ]
    steps = []
    for step in range(NUM_STEPS):
        chosen = [packs[i] for i in random.permutation(len(packs))[:NUM_SEQUENCES]]
        masks = [
            (random.random(SEQUENCE_LENGTH) < 0.5).astype(np.uint8) if step % 3 == 1 else None for _ in chosen
        ]
        if step == 5:  # one target in the whole batch, in the middle of a document
            chosen[1:3] = [[64], [33, 31]]
            masks = [np.zeros(SEQUENCE_LENGTH, np.uint8) for _ in chosen]
            masks[2][20] = 1
        steps.append(
            [
                PackedSequence(
                    random.integers(0, VOCAB_SIZE, SEQUENCE_LENGTH).astype(np.uint32),
                    np.cumsum([0, *lengths]).astype(np.int64),
                    mask,
                    Identity("test", f"step {step}", index),
                )
                for index, (lengths, mask) in enumerate(zip(chosen, masks, strict=True))
            ]
        )
    return steps


@dataclass(frozen=True)
class Job:
    """What the ranks of a pool are asked to do: which steps, at which layout, from where and to where.

    `layout` are the fields of a recipe's layout and dp. `start` is a checkpoint directory, converted (weights) or
    written by such a job (weights and optimizer); `save` a directory to write at the end.
    """

    layout: dict[str, Any]
    start: str
    recompute: str = "none"
    precision: str = "fp32"
    offload_activations: bool = False
    fp8_recipe: Fp8Recipe = "tensorwise"
    fp8_parameters: bool = False
    first: int = 0
    last: int = NUM_STEPS
    save: str = ""


def train(rank: int, job: Job) -> Trained:
    """Steps at one layout on this rank, the way training/stage.py takes them."""
    from megatron_prolong.mcore import build
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.runtime.replace import replaced
    from megatron_prolong.training.balance import micro_batches, share_out
    from megatron_prolong.training.step import train_step

    layout = Layout(**{name: value for name, value in job.layout.items() if name != "dp"})
    spec = OptimizerSpec(clip=0.5)
    # Megatron's bucket of 40M elements would hold all of this model: several show the order of what overlaps.
    buckets = partial(build.DistributedDataParallelConfig, bucket_size=10_000)
    offload = partial(build.HostOffload, min_bytes=1000)  # no activation of this model is of the usual size
    small = [(build, "DistributedDataParallelConfig", buckets), (build, "HostOffload", offload)]
    with replaced(small), megatron(layout, seed=1) as groups:
        assert groups.dp.size == job.layout.get("dp", 1)
        shape = read_shape(Path(job.start))
        model = build.build_model(
            shape, layout, precision=job.precision, recompute=job.recompute,
            fp8_recipe=job.fp8_recipe, fp8_parameters=job.fp8_parameters,
            offload_activations=job.offload_activations, loss_chunk_tokens=24,
        )  # fmt: skip
        connected = nccl_groups()
        optimizer = load(job, model, layout, spec)
        metrics, plans = [], []
        for sequences in batches()[job.first : job.last]:
            assignment = share_out(sequences, groups, SEQUENCE_LENGTH, COST)
            device = torch.device(torch.cuda.current_device())
            multiple = TOKEN_MULTIPLE if job.precision == "fp8" else 1
            shared = micro_batches(sequences, assignment, groups, layout, device, token_multiple=multiple)
            plans += [batch.documents.context.plan for batch in shared if batch.documents.context]
            tell = partial(list, [1.0, 0.1 * rank])
            metrics.append(train_step(model, optimizer, shared, groups, spec=spec, lr=1e-3, tell=tell))
            size = torch.distributed.get_world_size()
            assert metrics[-1].updated and metrics[-1].told == pytest.approx([size, 0.05 * size * (size - 1)])
        assert not job.offload_activations or model.offload.num_parked_bytes > 0
        if job.save:
            save(Path(job.save), model, optimizer, rank)
        assert nccl_groups() == connected, "NCCL took memory for a group in the middle of training"
        return Trained(
            [step.loss for step in metrics],
            [step.grad_norm for step in metrics],
            [step.num_targets for step in metrics],
            sum(len(plan.split) for plan in plans),
            sum(len(documents) for plan in plans for documents in plan.local),
            shards_of(model),
        )


def nccl_groups() -> set[str]:
    """Groups of ranks that NCCL has a communicator for."""
    if not torch.cuda.is_available():
        return set()
    backends = {group.group_name: group._get_backend(torch.device("cuda")) for group in _world.pg_map}
    return {name for name, backend in backends.items() if backend._is_initialized()}


def load(job: Job, model, layout: Layout, spec: OptimizerSpec):
    """Weights, and the optimizer with its moments where the checkpoint has them."""
    from megatron_prolong.mcore.checkpoint import load_weights, load_weights_and_optimizer
    from megatron_prolong.mcore.optimizer import build_optimizer

    directory = Path(job.start)
    if json.loads((directory / MANIFEST).read_text())["kind"] == "training":
        optimizer = build_optimizer(model, spec, layout, lr=1e-3)
        load_weights_and_optimizer(directory, model, optimizer)
        return optimizer
    load_weights(directory, model)
    return build_optimizer(model, spec, layout, lr=1e-3)


def save(directory: Path, model, optimizer, rank: int, strategy=None) -> None:
    from tests.mcore.saving import save_weights_and_optimizer

    save_weights_and_optimizer(directory, model, optimizer, strategy)
    if rank == 0:
        manifest = {"format": 1, "kind": "training", "shape": model.shape.to_dict(), "step": 0}
        (directory / MANIFEST).write_text(json.dumps(manifest))


def shards_of(model) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]:
    """This rank's weights: name, shape of the whole, where this part lies in it, its numbers."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    model.gather_weights()
    shards = []
    for chunk in model.bare_chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for tensor in nested_values(state):
            if not isinstance(tensor, ShardedTensor):
                continue
            local = tensor.data.detach().float().cpu().numpy().reshape(tensor.local_shape)
            local = local.reshape((1,) * tensor.prepend_axis_num + local.shape)
            place = tuple(
                slice(start, start + size)
                for start, size in zip(tensor.global_offset, local.shape, strict=True)
            )
            shards.append((tensor.key, tensor.global_shape, place, local.copy()))
    return shards


def assemble(ranks: list[Trained]) -> dict[str, np.ndarray]:
    """The whole weights of all ranks; every element must have been on some rank, and copies must agree."""
    whole: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, shape, place, local in rank.shards:
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            local = local[tuple(slice(0, target[place].shape[axis]) for axis in range(local.ndim))]
            if not np.isnan(target[place]).any():
                np.testing.assert_allclose(
                    target[place], local, rtol=1e-6, atol=1e-7, err_msg=f"copies of {name}"
                )
            target[place] = local
    assert all(not np.isnan(tensor).any() for tensor in whole.values())
    return {
        name: tensor[:VOCAB_SIZE] if "word_emb" in name or "output" in name else tensor
        for name, tensor in whole.items()
    }

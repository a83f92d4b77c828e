"""A checkpoint belongs to no layout: saved after four steps at one, it continues at any other with the same losses.

fp32: the first loss after the change within 1e-5 relative of the single process that never stopped, as in
test_layouts.py; the weights and both Adam moments went through the file, or the later steps would drift apart.
The weights in the file are those of the moment too, for who takes only them: an export, an evaluation.
(Sharding the optimizer or not is no layout: Megatron has two file formats for it, and training refuses the change.)
"""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_layouts
import torch
import torch.distributed as dist
from small_training import VOCAB_SIZE, Job, assemble, save, shards_of, train
from test_layouts import assert_equal_weights, pool_of
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import read_shape
from megatron_prolong.runtime.replace import replaced

LAYOUTS = {"": {}, "tp2 unsharded": {"tp": 2, "distributed_optimizer": False}, **test_layouts.LAYOUTS}
QUICK = [
    ("dp2", "tp2 unsharded"),
    ("tp2 sp", "cp2 p2p"),
    ("pp2 virtual 2", "dp2 distributed optimizer"),
    ("dp2 distributed optimizer", ""),
]
SLOW = [
    ("", "tp2 pp2"), ("tp2 pp2", "cp2 dp2"), ("cp4 a2a", "pp2 uneven"), ("dp4 distributed optimizer", "tp4 sp"),
    ("pp2 uneven", "dp2 distributed optimizer"),
]  # fmt: skip


def stored_weights(rank: int, saved: str, layout: Layout) -> SimpleNamespace:
    """What `assemble` takes, of the weights in a checkpoint."""
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.checkpoint import load_weights
    from megatron_prolong.mcore.groups import megatron

    with megatron(layout, seed=1):
        model = build_model(read_shape(Path(saved)), layout, precision="fp32", training=False)
        load_weights(Path(saved), model)
        return SimpleNamespace(shards=shards_of(model))


@pytest.mark.parametrize(
    ("before", "after"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda name: (name or "single").replace(" ", "-"),
)
def test_continues_at_another_layout(request, tmp_path, one_rank, before, after, checkpoint, single):
    expected, expected_weights = single
    first, second = LAYOUTS[before], LAYOUTS[after]
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    ranks = pool_of(request, first).run(train, Job(first, checkpoint, last=4, save=str(saved)))
    np.testing.assert_allclose(ranks[0].losses, expected.losses[:4], rtol=1e-5)
    assert_equal_weights(assemble(one_rank.run(stored_weights, str(saved), Layout())), assemble(ranks), 1e-7)
    ranks = pool_of(request, second).run(train, Job(second, str(saved), first=4))
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses[4:], rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms[4:], rtol=1e-5)
    assert_equal_weights(assemble(ranks), expected_weights, 1e-5)


def elements_read(rank: int, saved: str, layout: Layout) -> int:
    """How many numbers this rank reads from a checkpoint's files to load its weights."""
    from megatron_prolong.mcore import checkpoint

    read: list[int] = []

    class Counting(checkpoint._SafeReader):
        def read_data(self, plan, planner):
            read.extend(math.prod(item.lengths) for item in plan.items)
            return super().read_data(plan, planner)

    with replaced([(checkpoint, "_SafeReader", Counting)]):
        stored_weights(rank, saved, layout)
    return sum(read)


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2)], ids=["dp2", "cp2"])
def test_ranks_with_the_same_weights_share_out_the_reading(two_ranks, one_rank, checkpoint, layout):
    """Or a file server would have to give as many copies as there are replicas, at every start."""
    (whole,) = one_rank.run(elements_read, checkpoint, Layout())
    shares = two_ranks.run(elements_read, checkpoint, layout)
    assert sum(shares) == whole > 100_000
    assert max(shares) < 0.7 * whole


def save_after_every_step(rank: int, job: Job, root: str) -> None:
    """Train; after every step save with the stage's plan (`step N`) and, to compare, with its own (`alone N`).

    The first save of all fails on rank 1 alone, and after the third step one is given up with its snapshot taken.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_prolong.mcore.checkpoint import SaveStrategy, take_snapshot, training_state
    from megatron_prolong.runtime.replace import replaced
    from megatron_prolong.training import step

    numbers, strategy, train_step = itertools.count(1), SaveStrategy(), step.train_step

    def fail(*_: object) -> None:
        raise OSError("no such disk")

    def give_up(name: str, model, optimizer) -> None:
        take_snapshot(new_directory(Path(root, name)), training_state(model, optimizer), strategy)

    def step_and_save(model, optimizer, *args, **named):
        metrics, number = train_step(model, optimizer, *args, **named), next(numbers)
        if number == 1:
            broken = [(FileSystemWriterAsync, "prepare_write_data", fail)] if rank == 1 else []
            with replaced(broken), pytest.raises(OSError, match="no such") if broken else nullcontext():
                give_up("failed", model, optimizer)
        if number == 3:
            give_up("given up", model, optimizer)
        save(new_directory(Path(root, f"step {number}")), model, optimizer, rank, strategy)
        save(new_directory(Path(root, f"alone {number}")), model, optimizer, rank)
        return metrics

    with replaced([(step, "train_step", step_and_save)]):
        train(rank, job)


def new_directory(path: Path) -> Path:
    """As every rank sees it, empty."""
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return path


def stored_tensors(saved: Path) -> dict[str, torch.Tensor]:
    """All tensors in a checkpoint, whole; of the vocabulary without what a layout pads it with."""
    reader = torch_checkpoint.FileSystemReader(saved)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    padded = ("word_embeddings.weight", "output_layer.weight")
    return {key: tensor[:VOCAB_SIZE] if key.endswith(padded) else tensor for key, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("before", "after"), [("dp2 distributed optimizer", "tp2 sp"), ("tp2 dp2", "pp2")])
def test_every_save_of_a_stage_holds_its_own_numbers(request, tmp_path, before, after, checkpoint):
    """The saves of a stage share one plan; a plan of its own writes the same, and another layout loads it."""
    first = Job(LAYOUTS[before], checkpoint, precision="bf16", last=4)
    pool_of(request, first.layout).run(save_after_every_step, first, str(tmp_path))
    last: dict[str, torch.Tensor] = {}
    for number in range(1, 5):
        saved, again = tmp_path / f"step {number}", tmp_path / f"again {number}"
        expected = stored_tensors(tmp_path / f"alone {number}")
        assert last.keys() <= expected.keys() and all(
            not torch.equal(expected[key], tensor) for key, tensor in last.items() if "layernorm" not in key
        )
        again.mkdir()
        second = Job(LAYOUTS[after], str(saved), precision="bf16", last=0, save=str(again))
        pool_of(request, second.layout).run(train, second)
        for found in (stored_tensors(saved), stored_tensors(again)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        last = expected


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("before", "after"), [*QUICK[2:], ("dp2 distributed optimizer", "tp2 sp")])
def test_another_layout_loads_what_was_saved(request, tmp_path, before, after, checkpoint):
    """Saved again at once: weights, fp32 weights and both moments to the last bit, though buckets lie otherwise."""
    first, second = LAYOUTS[before], LAYOUTS[after]
    saved, again = tmp_path / "saved", tmp_path / "again"
    saved.mkdir()
    again.mkdir()
    pool_of(request, first).run(train, Job(first, checkpoint, precision="bf16", last=2, save=str(saved)))
    pool_of(request, second).run(train, Job(second, str(saved), precision="bf16", last=0, save=str(again)))
    expected, found = stored_tensors(saved), stored_tensors(again)
    assert expected.keys() == found.keys()
    assert len([key for key in expected if key.startswith("optimizer.state.exp_avg_sq.")]) > 5
    for key, tensor in expected.items():
        assert tensor.any() and torch.equal(tensor, found[key]), key

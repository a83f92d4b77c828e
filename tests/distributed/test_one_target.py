"""One token with a loss in the whole global batch: every layout has the same gradient, whichever rank holds it.

Ranks without a target must add nothing, and must not weigh: dividing by ranks or micro-batches, not by the one
target, would halve the gradient (Megatron-LM issue 7452). fp32, each weight's gradient within 1e-5 relative in
norm: the same few terms are summed in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import COST, SEQUENCE_LENGTH, VOCAB_SIZE
from test_layouts import pool_of

from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import read_shape

# (packed sequence, position in it) of the target: every part of a split document, and a document that stays whole.
TARGETS = [(0, 1), (0, 17), (1, 33), (2, 63), (3, 10), (3, 63)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "distributed_optimizer": False},
    "dp4": {"dp": 4, "distributed_optimizer": False},
    "cp2": {"cp": 2, "distributed_optimizer": False},
    "cp4": {"cp": 4, "cp_exchange": "p2p", "distributed_optimizer": False},
    "cp2 dp2": {"cp": 2, "dp": 2, "distributed_optimizer": False},
}


def batch(target: tuple[int, int]) -> list[PackedSequence]:
    """Four packed sequences whose masks leave only `target`."""
    random = np.random.default_rng(1)
    packs = [[64], [64], [40, 24], [8, 3, 53]]
    sequences = []
    for index, lengths in enumerate(packs):
        mask = np.zeros(SEQUENCE_LENGTH, np.uint8)
        if index == target[0]:
            mask[target[1]] = 1
        tokens = random.integers(0, VOCAB_SIZE, SEQUENCE_LENGTH).astype(np.uint32)
        boundaries = np.cumsum([0, *lengths]).astype(np.int64)
        sequences.append(PackedSequence(tokens, boundaries, mask, Identity("test", "shard", index)))
    return sequences


def gradients(
    rank: int, options: dict[str, Any], start: str
) -> list[tuple[float, int, dict[str, np.ndarray]]]:
    """Loss, number of targets and the gradient of every weight, for each target."""
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.checkpoint import load_weights
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.schedule import forward_backward
    from megatron_prolong.training.balance import micro_batches, share_out

    layout = Layout(**{name: value for name, value in options.items() if name != "dp"})
    found = []
    with megatron(layout, seed=1) as groups:
        model = build_model(read_shape(Path(start)), layout, precision="fp32", loss_chunk_tokens=24)
        load_weights(Path(start), model)
        for target in TARGETS:
            sequences = batch(target)
            assignment = share_out(sequences, groups, SEQUENCE_LENGTH, COST)
            shared = micro_batches(sequences, assignment, groups, layout, torch.device("cpu"))
            model.zero_gradients()
            loss, num_targets, _ = forward_backward(model, shared, groups)
            weights = dict(model.bare_chunks[0].named_parameters())
            found.append(
                (loss, num_targets, {name: w.main_grad.numpy().copy() for name, w in weights.items()})
            )
    return found


@pytest.fixture(scope="module")
def alone(one_rank, checkpoint):
    """The gradients of one process."""
    return one_rank.run(gradients, {"distributed_optimizer": False}, checkpoint)[0]


def test_the_one_target_matters(alone):
    for loss, num_targets, weights in alone:
        assert num_targets == 1 and loss > 1
        assert all(np.linalg.norm(gradient) > 1e-3 for gradient in weights.values())
    assert len({loss for loss, *_ in alone}) == len(TARGETS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_is_that_of_one_process(request, name, checkpoint, alone):
    for rank in pool_of(request, LAYOUTS[name]).run(gradients, LAYOUTS[name], checkpoint):
        for (loss, num_targets, weights), (expected_loss, _, expected) in zip(rank, alone, strict=True):
            assert num_targets == 1
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            for key, gradient in weights.items():
                error = np.linalg.norm(gradient - expected[key]) / np.linalg.norm(expected[key])
                assert error < 1e-5, f"{key}: relative error {error:.1e}"

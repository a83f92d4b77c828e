"""Every parallel layout trains like one process: loss, gradient norm and final weights of eight AdamW steps.

All layouts start from one converted checkpoint and see the same global batches, whose documents straddle every
boundary: single tokens, documents shorter than 2·cp, documents of a whole pack, a pack of single tokens, loss
masks, and one batch in which a single token has a loss.

Tolerances in fp32: loss and gradient norm 1e-5 relative. Weights 1e-5 relative in norm per tensor; single
elements may differ more, because Adam divides a gradient by its own size and so blows up the last bits of small
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prolong.data.balance import CostModel
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.recipe.shape import ModelShape

SEQUENCE_LENGTH, NUM_SEQUENCES, NUM_STEPS, VOCAB_SIZE = 64, 4, 8, 130
EXCHANGES = ("all_gather", "p2p", "a2a", "a2a+p2p")
LAYOUTS = {
    "tp2": {"tp": 2, "sequence_parallel": False},
    "tp2 sp": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 virtual 2": {"pp": 2, "virtual_pp": 2},
    "pp4": {"pp": 4},
    **{f"cp2 {exchange}": {"cp": 2, "cp_exchange": exchange} for exchange in EXCHANGES},
    **{f"cp4 {exchange}": {"cp": 4, "cp_exchange": exchange} for exchange in EXCHANGES},
    "dp2": {"dp": 2, "distributed_optimizer": False},
    "dp2 distributed optimizer": {"dp": 2},
    "dp4 distributed optimizer": {"dp": 4},
    "tp4 sp": {"tp": 4},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2, "cp_exchange": "p2p"},
    "cp2 dp2": {"cp": 2, "dp": 2, "cp_exchange": "a2a"},
    "tp2 dp2": {"tp": 2, "dp": 2},
    "pp2 dp2": {"pp": 2, "dp": 2},
}
# Attention so dear that documents are worth splitting at these lengths.
COST = CostModel(linear=1.0, quadratic=0.1)
# One of each kind; every other case is marked slow, for each takes its ranks through eight steps and a gather.
QUICK_CASES = [
    ("tp2 sp", "none"), ("pp2", "full"), ("cp2 all_gather", "none"), ("cp2 p2p", "none"), ("cp2 a2a", "none"),
    ("dp2 distributed optimizer", "none"),
]  # fmt: skip
CASES = [(name, recompute) for name in LAYOUTS for recompute in ("none", "full", "selective")]


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


def train(rank: int, options: dict, recompute: str, checkpoint: str) -> Trained:
    """Eight steps at one layout on this rank, the way training/stage.py takes them."""
    from megatron_prolong.mcore.build import build_model
    from megatron_prolong.mcore.checkpoint import load_weights
    from megatron_prolong.mcore.groups import megatron
    from megatron_prolong.mcore.optimizer import build_optimizer
    from megatron_prolong.training.balance import micro_batches, share_out
    from megatron_prolong.training.run_directory import Checkpoint
    from megatron_prolong.training.step import train_step

    layout = Layout(**{name: value for name, value in options.items() if name != "dp"})
    spec = OptimizerSpec(clip=0.5)
    with megatron(layout, seed=1) as groups:
        assert groups.dp.size == options.get("dp", 1)
        start = Checkpoint.open(Path(checkpoint))
        shape = ModelShape.from_dict(start.manifest["shape"])
        model = build_model(shape, layout, precision="fp32", recompute=recompute, loss_chunk_tokens=24)
        load_weights(start.directory, model)
        optimizer = build_optimizer(model, spec, layout, lr=1e-3)
        metrics, plans = [], []
        for sequences in batches():
            assignment = share_out(sequences, groups, SEQUENCE_LENGTH, COST)
            shared = micro_batches(sequences, assignment, groups, layout, COST, torch.device("cpu"))
            plans += [batch.documents.context.plan for batch in shared if batch.documents.context]
            metrics.append(train_step(model, optimizer, shared, groups, spec=spec, lr=1e-3))
            assert metrics[-1].updated
        return Trained(
            [step.loss for step in metrics],
            [step.grad_norm for step in metrics],
            [step.num_targets for step in metrics],
            sum(len(plan.split) for plan in plans),
            sum(len(documents) for plan in plans for documents in plan.local),
            shards_of(model),
        )


def shards_of(model) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]:
    """This rank's weights: name, shape of the whole, where this part lies in it, its numbers."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    shards = []
    for chunk in model.bare_chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for tensor in nested_values(state):
            if not isinstance(tensor, ShardedTensor):
                continue
            local = tensor.data.detach().float().numpy().reshape(tensor.local_shape)
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    """A random Llama (4 layers, 8 heads in 4 groups), written by transformers and converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_prolong.convert.to_megatron import to_megatron

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    hf = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5 if "embed" in name else 0.1)
    directory = tmp_path_factory.mktemp("layouts")
    hf.save_pretrained(directory / "hf")
    to_megatron(directory / "hf", directory / "megatron")
    return str(directory / "megatron")


@pytest.fixture(scope="session")
def single(one_rank, checkpoint) -> tuple[Trained, dict[str, np.ndarray]]:
    """One process: what all layouts must equal."""
    ranks = one_rank.run(train, {"distributed_optimizer": False}, "none", checkpoint)
    return ranks[0], assemble(ranks)


def test_the_single_process_really_trains(single, checkpoint):
    trained, weights = single
    assert trained.num_targets[5] == 1
    assert all(norm > 0.1 for norm in trained.grad_norms)
    assert max(trained.losses) > 4
    assert sum(tensor.size for tensor in weights.values()) > 100_000


@pytest.mark.parametrize(
    ("name", "recompute"),
    [pytest.param(*case, marks=[] if case in QUICK_CASES else [pytest.mark.slow]) for case in CASES],
    ids=["-".join(case).replace(" ", "-") for case in CASES],
)
def test_trains_like_one_process(request, name, recompute, checkpoint, single):
    expected, expected_weights = single
    options = LAYOUTS[name]
    size = math.prod(options.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))
    pool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    ranks = pool.run(train, options, recompute, checkpoint)
    for rank in ranks:
        assert rank.num_targets == expected.num_targets
        if options.get("cp", 1) > 1:
            assert rank.num_split_documents > 10 and rank.num_local_documents > 10
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=1e-5)
    weights = assemble(ranks)
    assert weights.keys() == expected_weights.keys()
    for key, expected_tensor in expected_weights.items():
        error = np.linalg.norm(weights[key] - expected_tensor) / np.linalg.norm(expected_tensor)
        assert error < 1e-5, f"{key}: relative error {error:.1e}"

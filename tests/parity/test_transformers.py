"""Our model, loss, gradients and AdamW against Hugging Face transformers, one process, fp32.

Tolerances: both sides compute in fp32 with sums in another order; 1e-4 relative is some 1000 ulp, an error in
any formula is orders of magnitude larger.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import (
    LLAMA31_SCALING,
    YARN_SCALING,
    copy_weights,
    megatron_weights,
    reference_llama,
    shape_of,
)

from megatron_prolong.data.batch import NO_LABEL, PackedBatch, collate_pieces
from megatron_prolong.data.packed import Piece
from megatron_prolong.mcore import build
from megatron_prolong.mcore.attention import DocumentAttention
from megatron_prolong.mcore.build import build_model
from megatron_prolong.mcore.config import transformer_config
from megatron_prolong.mcore.groups import ParallelGroups, megatron
from megatron_prolong.mcore.micro_batch import MicroBatch, micro_batch
from megatron_prolong.mcore.offload import HostOffload
from megatron_prolong.mcore.optimizer import build_optimizer
from megatron_prolong.mcore.schedule import forward_backward
from megatron_prolong.recipe.schema import Layout, OptimizerSpec
from megatron_prolong.runtime.launch import World, distributed
from megatron_prolong.training.step import train_step

LENGTHS = (7, 1, 130, 64, 2, 300)  # crosses every boundary of interest, one document of a single token
VARIANTS = {
    "base-5e5": {"rope_base": 5e5},
    "base-8e6": {"rope_base": 8e6},
    "llama31-scaling": {"rope_base": 5e5, "scaling": LLAMA31_SCALING},
    "yarn": {"scaling": YARN_SCALING},
    "tied": {"tied": True},
}


@pytest.fixture(scope="module")
def world():
    with distributed() as world:
        yield world


@pytest.fixture
def groups(world):
    with megatron(Layout(), seed=1) as groups:
        yield groups


def random_batch(seed: int, lengths=LENGTHS, vocab_size=1000) -> PackedBatch:
    random = np.random.default_rng(seed)
    return collate_pieces(Piece(random.integers(0, vocab_size, n).astype(np.uint32), None) for n in lengths)


def to_micro_batch(batch: PackedBatch, groups: ParallelGroups, world: World) -> MicroBatch:
    return micro_batch(batch, groups=groups, layout=Layout(), device=world.device)


def documents_of(batch: PackedBatch):
    bounds = batch.cu_seqlens.tolist()
    return [batch.tokens_T[start:end] for start, end in pairwise(bounds)]


def reference_loss(hf, batches: list[PackedBatch]) -> torch.Tensor:
    """Mean over all targets of all documents, each document alone through transformers."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        for document in documents_of(batch):
            if len(document) < 2:
                continue
            logits = hf(document[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
            count += len(document) - 1
    return total / count


def ours_from(hf, recompute: str = "none", **options):
    model = build_model(shape_of(hf), Layout(), precision="fp32", recompute=recompute, **options)
    copy_weights(hf, model.bare_chunks[0])
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_packed_documents(variant, world, groups):
    hf = reference_llama(**VARIANTS[variant])
    model = ours_from(hf, training=False)
    batch = to_micro_batch(packed := random_batch(1), groups, world)
    with torch.no_grad():
        logits = model.chunks[0](batch.tokens, batch.positions, None, packed_seq_params=batch.documents)[0]
        expected = torch.cat([hf(document[None]).logits[0] for document in documents_of(packed)])
    # Logits have a standard deviation of about 10; 1e-4 of the largest is the absolute error allowed.
    torch.testing.assert_close(logits[:, :1000], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("recompute", ["none", "selective", "all_but_attention", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant, recompute, world, groups):
    hf = reference_llama(**VARIANTS[variant])
    model = ours_from(hf, recompute, loss_chunk_tokens=100)
    batches = [random_batch(2), random_batch(3, lengths=(200, 304))]
    loss, num_targets, _ = forward_backward(
        model, [to_micro_batch(b, groups, world) for b in batches], groups
    )
    expected = reference_loss(hf, batches)
    expected.backward()
    assert num_targets == sum(int((batch.labels_T != NO_LABEL).sum()) for batch in batches)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    gradients = megatron_weights(hf, gradients=True)
    ours = dict(model.bare_chunks[0].named_parameters())
    assert ours.keys() == gradients.keys()
    for name, expected_gradient in gradients.items():
        actual = ours[name].main_grad[: expected_gradient.shape[0]]
        error = (actual - expected_gradient).norm() / expected_gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("recompute", "times"), [("none", 1), ("selective", 1), ("all_but_attention", 1), ("full", 2)]
)
def test_attention_runs_again_only_where_it_is_recomputed(recompute, times, world, groups, monkeypatch):
    calls, attend = [], DocumentAttention.attend

    def counted(self, *tensors, **named):
        calls.append(self.layer_number)
        return attend(self, *tensors, **named)

    monkeypatch.setattr(DocumentAttention, "attend", counted)
    model = ours_from(reference_llama(), recompute)
    forward_backward(model, [to_micro_batch(random_batch(2), groups, world)], groups)
    assert len(calls) == times * model.shape.num_layers


@pytest.mark.parametrize("recompute", ["none", "all_but_attention", "full"])
def test_activations_in_host_memory_change_no_gradient(recompute, world, groups):
    """Within 1e-5: a slice that was saved comes back contiguous, and a kernel may then sum in another order."""
    hf, batch = reference_llama(), random_batch(2)
    gradients = []
    for offload in (False, True):
        model = ours_from(hf, recompute, offload_activations=offload)
        if offload:
            model = replace(model, offload=HostOffload(model.chunks, min_bytes=1024))  # of a small model too
        forward_backward(model, [to_micro_batch(batch, groups, world)], groups)
        gradients.append({name: p.main_grad.clone() for name, p in model.bare_chunks[0].named_parameters()})
    assert model.offload.num_parked_bytes > sum(LENGTHS) * 128 * 4 * 4  # the residual stream of every layer
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("decay_norms", "clip"), [(False, 0.5), (True, 0.0)], ids=["clipped", "decaying norms"]
)
def test_twenty_adamw_steps(decay_norms, clip, world, groups):
    """The same batches through a plain PyTorch loop over the HF model with torch.optim.AdamW."""
    hf = reference_llama()
    model = ours_from(hf)
    spec = OptimizerSpec(decay_norms=decay_norms, clip=clip, eps=1e-3)  # so that Adam sees a gradient's size
    loaded = OptimizerSpec(beta1=0.5, beta2=0.5, eps=1.0, weight_decay=0.5)  # every step sets its own
    optimizer = build_optimizer(model, loaded, Layout(), lr=1.0)
    decayed = [p for p in hf.parameters() if p.ndim > 1]
    norms = [p for p in hf.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": norms, "weight_decay": spec.weight_decay if decay_norms else 0.0}],
        lr=1e-3, betas=(spec.beta1, spec.beta2), eps=spec.eps, weight_decay=spec.weight_decay,
    )  # fmt: skip
    losses, expected_losses = [], []
    for step in range(20):
        batches = [random_batch(100 + step % 2), random_batch(200 + step % 2, lengths=(504,))]
        lr = 1e-3 * (step + 1) / 20
        metrics = train_step(
            model, optimizer, [to_micro_batch(b, groups, world) for b in batches], groups, spec=spec, lr=lr
        )
        losses.append(metrics.loss)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.zero_grad()
        loss = reference_loss(hf, batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), clip or math.inf)
        reference.step()
        expected_losses.append(float(loss))
        # Adam divides by the root of tiny second moments and so amplifies rounding; the norm sees it first.
        assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-3)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    # The run went somewhere, so the comparison was not of a standing model.
    assert max(expected_losses) - min(expected_losses) > 0.5
    # Decay takes 1e-3 off a norm's weight in these steps.
    ours, expected = dict(model.bare_chunks[0].named_parameters()), megatron_weights(hf)
    for name in (name for name, weight in ours.items() if weight.ndim == 1):
        torch.testing.assert_close(ours[name].data, expected[name], rtol=0, atol=2e-4)


def test_a_carried_optimizer_may_begin_or_cease_to_decay_norms(world, groups):
    """Megatron looks for a checkpoint's parameter groups by these multipliers."""
    hf = reference_llama()
    specs = [OptimizerSpec(decay_norms=decay) for decay in (False, True)]
    optimizers = [build_optimizer(ours_from(hf), spec, Layout(), lr=1e-3) for spec in specs]
    with_decay, without = (
        [(group["wd_mult"], group["lr_mult"]) for group in one.param_groups] for one in optimizers
    )
    assert with_decay == without


def test_documents_do_not_see_each_other(world, groups):
    """Changing one document leaves every logit of the others exactly as it was."""
    hf = reference_llama()
    model = ours_from(hf, training=False)
    first = random_batch(1)
    tokens = first.tokens_T.clone()
    start, end = first.cu_seqlens[2:4].tolist()
    tokens[start:end] = (tokens[start:end] + 1) % 1000
    logits = []
    for batch_tokens in (first.tokens_T, tokens):
        batch = to_micro_batch(replace(first, tokens_T=batch_tokens), groups, world)
        with torch.no_grad():
            logits.append(
                model.chunks[0](batch.tokens, batch.positions, None, packed_seq_params=batch.documents)[0]
            )
    outside = torch.ones(len(tokens), dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(logits[0][outside], logits[1][outside])
    assert not torch.equal(logits[0][start:end], logits[1][start:end])


def test_loss_does_not_depend_on_the_order_of_documents(world, groups):
    hf = reference_llama()
    model = ours_from(hf)
    random = np.random.default_rng(5)
    pieces = [Piece(random.integers(0, 1000, n).astype(np.uint32), None) for n in LENGTHS]
    losses = [
        forward_backward(model, [to_micro_batch(collate_pieces(order), groups, world)], groups)
        for order in (pieces, pieces[::-1])
    ]
    assert losses[0][1] == losses[1][1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)


def test_it_is_built_of_zeros_with_gradients_in_fp32_where_it_trains(world, groups):
    """Rows that pad the vocabulary are in no checkpoint: what memory happened to hold might be NaN."""
    shape = shape_of(reference_llama())
    for training in (True, False):
        options = {"precision": "bf16", "loss_chunk_tokens": 9, "training": training}
        (chunk,) = build_model(shape, Layout(), **options).bare_chunks
        assert chunk.loss_chunk_tokens == 9
        for name, weight in chunk.named_parameters():
            assert weight.dtype == torch.bfloat16 and not weight.any(), name
            gradient = getattr(weight, "main_grad", None)
            assert gradient.dtype == torch.float32 if training else gradient is None, name


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_weights_in_bf16_are_updated_in_fp32(distributed_optimizer, world, groups):
    layout = Layout(distributed_optimizer=distributed_optimizer)
    model = build_model(shape_of(reference_llama()), layout, precision="bf16")
    optimizer = build_optimizer(model, OptimizerSpec(), layout, lr=1e-3)
    updated = [weight.dtype for group in optimizer.param_groups for weight in group["params"]]
    assert updated and set(updated) == {torch.float32}


def test_every_setting_of_a_model_reaches_megatrons_config(world, groups, monkeypatch):
    """On a CPU most of them change nothing."""
    told = {}

    def plain(shape, layout, **settings):
        told.update(settings)
        return transformer_config(shape, layout, precision="fp32", recompute="none")

    monkeypatch.setattr(build, "transformer_config", plain)
    settings = {"precision": "fp8", "recompute": "full", "fp8_recipe": "blockwise", "fp8_parameters": True}
    build_model(shape_of(reference_llama()), Layout(), **settings, rank_tokens=64)
    assert told == {**settings, "rank_tokens": 64}


def test_padded_vocabulary_takes_no_probability(world, groups):
    """1000 tokens are stored as 1024 rows; the 24 others must not enter the softmax."""
    hf = reference_llama()
    model = ours_from(hf)
    chunk = model.bare_chunks[0]
    batch = random_batch(4)
    losses = []
    for filler in (0.0, 50.0):
        with torch.no_grad():
            chunk.output_layer.weight[1000:] = filler
        losses.append(forward_backward(model, [to_micro_batch(batch, groups, world)], groups)[0])
    assert chunk.output_layer.weight.shape[0] == 1024
    assert losses[0] == losses[1]

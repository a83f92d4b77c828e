"""Layouts in bf16 and FP8 on GPUs, one rank to each, train like one CPU process in fp32: losses, norms, weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from small_training import Job, Trained, assemble, train
from test_layouts import (
    BF16_GRAD_NORM,
    BF16_LOSS,
    BF16_WEIGHTS,
    LAYOUTS,
    QUICK_CASES,
    assert_equal_weights,
    num_ranks,
)
from test_spread_cache import answers

from megatron_prolong.recipe.fp8 import Fp8Recipe, fp8_problem

pytestmark = pytest.mark.gpu

# Numbers with 3 bits behind the point: single products are off by up to 6%, most of it averages out, but one batch
# has a single target. The update's direction (cosine): bf16 weights, near one in a norm, round most of it away.
FP8_LOSS, FP8_GRAD_NORM, FP8_UPDATE = 5e-2, 6e-2, 0.7
# Transformer Engine's p2p rounds attention's sums to bf16 cp times: roundings of 2**-8 too, within the same bounds.
CASES = [("one", "none"), *((name, "none") for name in LAYOUTS), *QUICK_CASES, ("cp2 p2p", "selective")]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """By their number of ranks."""
    pools = {size: RankPool(size, on_gpus=True) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="module")
def initial(one_rank, checkpoint) -> dict[str, np.ndarray]:
    """The weights before training."""
    return assemble(one_rank.run(train, Job({"distributed_optimizer": False}, checkpoint, last=0)))


@pytest.mark.parametrize(
    ("name", "recompute"), dict.fromkeys(CASES), ids=lambda value: str(value).replace(" ", "-")
)
def test_bf16_stays_within_rounding_of_fp32(pools, name, recompute, checkpoint, single):
    ranks = train_on_gpus(pools, Job(LAYOUTS.get(name, {}), checkpoint, recompute, precision="bf16"))
    assert_close(ranks, *single)


@pytest.mark.parametrize("name", ["one", "tp2 sp", "pp2", "cp2 p2p"])
def test_activations_on_the_host_change_nothing(pools, name, checkpoint, single):
    job = Job(LAYOUTS.get(name, {}), checkpoint, "selective", precision="bf16", offload_activations=True)
    assert_close(train_on_gpus(pools, job), *single)


@pytest.mark.parametrize("recipe", get_args(Fp8Recipe))
@pytest.mark.parametrize("name", ["one", "tp2", "tp2 sp", "pp2", "cp2 p2p", "cp2 all_gather", "dp2"])
def test_fp8_stays_within_rounding_of_fp32(pools, name, recipe, checkpoint, initial, single):
    if (name, recipe) == ("tp2 sp", "blockwise"):
        pytest.skip(
            "the activations that sequence parallelism gathers are blocks of 128, wider than this model"
        )
    train_in_fp8(pools, Job(LAYOUTS.get(name, {}), checkpoint, fp8_recipe=recipe), initial, single)


@pytest.mark.parametrize("name", ["one", "tp2 sp", "pp2 dp2"])
@pytest.mark.parametrize(
    "options",
    [
        {"fp8_parameters": True},
        {"recompute": "selective", "offload_activations": True},
        {"recompute": "full"},
        {"recompute": "all_but_attention"},
        {"recompute": "all_but_attention", "fp8_recipe": "delayed"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_fp8_with_less_memory(pools, name, options, checkpoint, initial, single):
    train_in_fp8(pools, Job(LAYOUTS.get(name, {}), checkpoint, **options), initial, single)


@pytest.mark.parametrize("options", [{"fp8_parameters": True}, {"fp8_recipe": "delayed"}], ids=str)
def test_an_fp8_checkpoint_continues_at_another_layout(pools, options, checkpoint, initial, single, tmp_path):
    saved = str(tmp_path)
    before = Job(LAYOUTS["dp2 distributed optimizer"], checkpoint, last=4, save=saved, **options)
    train_in_fp8(pools, before, {}, single)
    train_in_fp8(pools, Job(LAYOUTS["tp2 sp"], saved, first=4, **options), initial, single)


def train_in_fp8(pools: dict[int, RankPool], job: Job, initial: dict[str, np.ndarray], single: tuple) -> None:
    """Train, and compare losses, norms and the updates of `initial` weights with those of fp32."""
    pytest.importorskip("transformer_engine")
    capability = torch.cuda.get_device_capability()
    if problem := fp8_problem(job.fp8_recipe, capability, job.layout.get("cp", 1)):
        pytest.skip(problem)
    ranks, (expected, trained) = train_on_gpus(pools, replace(job, precision="fp8")), single
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses[job.first : job.last], rtol=FP8_LOSS)
        norms = expected.grad_norms[job.first : job.last]
        np.testing.assert_allclose(rank.grad_norms, norms, rtol=FP8_GRAD_NORM)
    weights = assemble(ranks)
    for name, before in initial.items():
        update, expected_update = (weights[name] - before).ravel(), (trained[name] - before).ravel()
        lengths = np.linalg.norm(update) * np.linalg.norm(expected_update)
        assert update @ expected_update > FP8_UPDATE * lengths, name


@pytest.mark.parametrize(
    ("before", "after"), [("one", "tp2 sp"), ("cp2 p2p", "pp2"), ("dp2 distributed optimizer", "one")]
)
def test_a_checkpoint_continues_at_another_layout(pools, before, after, checkpoint, single, tmp_path):
    saved = str(tmp_path)
    train_on_gpus(pools, Job(LAYOUTS.get(before, {}), checkpoint, precision="bf16", last=4, save=saved))
    ranks = train_on_gpus(pools, Job(LAYOUTS.get(after, {}), saved, precision="bf16", first=4))
    assert_close(ranks, *single, first=4)


@pytest.mark.parametrize("layout", [{}, {"cp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_evaluation_over_gpus_answers_as_the_cpu(pools, one_rank, checkpoint, layout):
    """Log-probabilities of 240 tokens. 0.05: logits near 1 in bf16's 8 bits, over a few layers."""
    pool = pool_for(pools, layout)
    ((expected, *_),) = one_rank.run(answers, checkpoint, {})
    for logprobs, *_ in pool.run(answers, checkpoint, layout, "bf16"):
        np.testing.assert_allclose(logprobs, expected, atol=0.05)


def test_a_checkpoint_of_the_cpu_continues(pools, one_rank, checkpoint, single, tmp_path):
    """Its optimizer is PyTorch's Adam, the GPU's Transformer Engine's where that is installed."""
    one_rank.run(train, Job({}, checkpoint, precision="bf16", last=4, save=str(tmp_path)))
    assert_close(train_on_gpus(pools, Job({}, str(tmp_path), precision="bf16", first=4)), *single, first=4)


@pytest.mark.parametrize(
    ("name", "offload_activations"),
    [("one", True), ("tp2 sp", False), ("pp2", True), ("cp2 all_gather", False), ("cp2 p2p", True)],
)
def test_no_stream_touches_what_another_may_still_write(name, offload_activations, checkpoint):
    """Under PyTorch's sanitizer, which raises where two streams meet in memory and nothing orders them."""
    layout = LAYOUTS.get(name, {})
    job = Job(layout, checkpoint, precision="bf16", offload_activations=offload_activations, last=2)
    pool = RankPool(num_ranks(layout), on_gpus=True)  # of its own: the sanitizer stays
    try:
        train_on_gpus({pool.size: pool}, job, train_under_sanitizer)
    finally:
        pool.close()


def train_under_sanitizer(rank: int, job: Job) -> Trained:
    from torch.cuda import _sanitizer

    handle = _sanitizer.ArgumentHandler._handle_argument

    def handle_memory(self: Any, value: Any, *args: Any, **named: Any) -> None:
        # It takes an empty tensor's id for its address, and Python gives the id of one that is gone to the next.
        if not isinstance(value, torch.Tensor) or value.numel():
            handle(self, value, *args, **named)

    _sanitizer.ArgumentHandler._handle_argument = handle_memory
    _sanitizer.enable_cuda_sanitizer()
    return train(rank, job)


def train_on_gpus(pools: dict[int, RankPool], job: Job, function: Any = train) -> list[Trained]:
    return pool_for(pools, job.layout).run(function, job)


def pool_for(pools: dict[int, RankPool], layout: dict[str, Any]) -> RankPool:
    size = num_ranks(layout)
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    return pools[size]


def assert_close(ranks: list[Trained], expected: Trained, expected_weights, first: int = 0) -> None:
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses[first:], rtol=BF16_LOSS)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms[first:], rtol=BF16_GRAD_NORM)
    assert_equal_weights(assemble(ranks), expected_weights, BF16_WEIGHTS)

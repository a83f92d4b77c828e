"""Every parallel layout trains like one process: loss, gradient norm and final weights of eight AdamW steps.

All layouts start from one converted checkpoint and see the same global batches (small_training.py).

Tolerances in fp32: loss and gradient norm 1e-5 relative. Weights 1e-5 relative in norm per tensor; single
elements may differ more, because Adam divides a gradient by its own size and so blows up the last bits of small
ones.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from rank_pool import RankPool
from small_training import Job, assemble, train

from megatron_prolong.recipe.rope import YarnScaling
from megatron_prolong.recipe.shape import MANIFEST

EXCHANGES = ("all_gather", "p2p", "a2a", "a2a+p2p")
LAYOUTS = {
    "tp2": {"tp": 2, "sequence_parallel": False},
    "tp2 sp": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 virtual 2": {"pp": 2, "virtual_pp": 2},
    "pp2 uneven": {"pp": 2, "first_stage_layers": 1},
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
MODES = ("none", "selective", "all_but_attention", "full")
# One of each kind; every other case is marked slow, for each takes its ranks through eight steps and a gather.
QUICK_CASES = [
    ("tp2 sp", "none"), ("pp2", "full"), ("cp2 all_gather", "none"), ("cp2 p2p", "none"), ("cp2 a2a", "none"),
    ("dp2 distributed optimizer", "none"), ("pp2 uneven", "none"), ("pp2", "block:1"),
    ("cp2 p2p", "all_but_attention"), ("pp2", "all_but_attention"),
]  # fmt: skip
CASES = [(name, recompute) for name in LAYOUTS for recompute in MODES]
CASES += [("pp2", "block:1"), ("tp2 cp2", "block:3")]


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
    ranks = pool_of(request, options).run(train, Job(options, checkpoint, recompute))
    for rank in ranks:
        assert rank.num_targets == expected.num_targets
        if options.get("cp", 1) > 1:
            assert rank.num_split_documents > 10 and rank.num_local_documents > 10
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=1e-5)
    assert_equal_weights(assemble(ranks), expected_weights, 1e-5)


def test_yarns_positions_and_temperature_too(one_rank, two_ranks, checkpoint, single, tmp_path):
    """The same weights; an exchange that lost what YaRN does to the scores would give another loss."""
    shutil.copytree(checkpoint, tmp_path / "yarn")
    manifest = json.loads((tmp_path / "yarn" / MANIFEST).read_text())
    scaling = YarnScaling(factor=4.0, original_max_length=16, attention_factor=1.2)
    manifest["shape"]["rope_scaling"] = asdict(scaling)
    (tmp_path / "yarn" / MANIFEST).write_text(json.dumps(manifest))
    job = Job({"distributed_optimizer": False}, str(tmp_path / "yarn"), last=2)
    (expected,) = one_rank.run(train, job)
    assert abs(expected.losses[0] - single[0].losses[0]) > 1e-3
    for exchange in EXCHANGES[:3]:
        for rank in two_ranks.run(train, replace(job, layout=LAYOUTS[f"cp2 {exchange}"])):
            np.testing.assert_allclose(rank.losses, expected.losses, rtol=1e-5)


def test_tied_embeddings_of_two_pipeline_stages_stay_one(one_rank, two_ranks, checkpoint, tmp_path):
    """The last stage has a copy of the first one's: their gradients are added up, and their norm counts once."""
    shutil.copytree(checkpoint, tmp_path / "tied")
    manifest = json.loads((tmp_path / "tied" / MANIFEST).read_text())
    manifest["shape"]["tie_embeddings"] = True
    (tmp_path / "tied" / MANIFEST).write_text(json.dumps(manifest))
    job = Job({"distributed_optimizer": False}, str(tmp_path / "tied"), last=3)
    (expected,) = one_rank.run(train, job)
    ranks = two_ranks.run(train, replace(job, layout=LAYOUTS["pp2"]))
    for rank in ranks:
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=1e-5)
    weights = assemble([expected])
    assert "output_layer.weight" not in weights
    assert_equal_weights(assemble(ranks), weights, 1e-5)


# Activations and products rounded to 8 bits: two orders of the same sum differ by some of their last bits
# (2**-8), and so do eight steps in bf16 and in fp32 (weights and moments are fp32 in both). One batch has a
# single target, whose loss nothing averages out: it differs most, by 0.5% where a GPU's work is done by a CPU.
BF16_LOSS, BF16_GRAD_NORM, BF16_WEIGHTS = 1e-2, 3e-2, 1e-2


@pytest.mark.parametrize("name", [name for name, recompute in QUICK_CASES if recompute == "none"])
def test_bf16_stays_within_rounding_of_fp32(request, name, checkpoint, single):
    expected, expected_weights = single
    ranks = pool_of(request, LAYOUTS[name]).run(train, Job(LAYOUTS[name], checkpoint, precision="bf16"))
    for rank in ranks:
        assert rank.losses != expected.losses  # it really was another precision
        np.testing.assert_allclose(rank.losses, expected.losses, rtol=BF16_LOSS)
        np.testing.assert_allclose(rank.grad_norms, expected.grad_norms, rtol=BF16_GRAD_NORM)
    assert_equal_weights(assemble(ranks), expected_weights, BF16_WEIGHTS)


def pool_of(request, layout: dict) -> RankPool:
    """The pool with as many ranks as the layout takes."""
    return request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[num_ranks(layout)])


def num_ranks(layout: dict) -> int:
    return math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


def assert_equal_weights(weights, expected_weights, tolerance: float) -> None:
    assert weights.keys() == expected_weights.keys()
    for key, expected in expected_weights.items():
        error = np.linalg.norm(weights[key] - expected) / np.linalg.norm(expected)
        assert error < tolerance, f"{key}: relative error {error:.1e}"

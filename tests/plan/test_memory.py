"""Bytes per rank: closed forms that can be checked by hand, and what must grow or shrink with what."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from plan_shapes import LLAMA3_8B, TINY

from megatron_prolong.plan.job import Job
from megatron_prolong.plan.memory import (
    GPU_KERNELS,
    activation_bytes,
    attention_gradients,
    gpu_kernels,
    in_flight,
    kept_by_chunk,
    kept_by_layer,
    layer_working,
    loss_working,
    peak_memory,
    rank_memory,
    saved_by_layer,
)
from megatron_prolong.plan.volume import step_volume
from megatron_prolong.plan.weights import buffer_elements, fp8_weights, stage_weights
from megatron_prolong.recipe.counts import num_parameters
from megatron_prolong.recipe.schema import Layout

JOB = Job(LLAMA3_8B, Layout(), 8, 65_536, 64)


def test_weights_of_llama3_8b_are_the_published_number() -> None:
    assert num_parameters(LLAMA3_8B) == 8_030_261_248  # sum over the safetensors index of the release


@pytest.mark.parametrize("tp,pp", [(1, 1), (2, 1), (1, 4), (4, 2), (8, 4)])
def test_stages_together_hold_the_model_once(tp: int, pp: int) -> None:
    job = replace(JOB, layout=Layout(tp=tp, pp=pp), world_size=tp * pp)
    held = tp * sum(sum(stage_weights(job, rank)) for rank in range(pp))
    norms = (2 * LLAMA3_8B.num_layers + 1) * LLAMA3_8B.hidden_size  # on every tensor-parallel rank
    padding = 2 * (job.vocab_rows * tp - LLAMA3_8B.vocab_size) * LLAMA3_8B.hidden_size
    assert held == num_parameters(LLAMA3_8B) + (tp - 1) * norms + padding


def test_tied_embeddings_are_held_once_on_one_stage_and_twice_on_two() -> None:
    tied = LLAMA3_8B.replace(tie_embeddings=True)
    vocabulary = LLAMA3_8B.vocab_size * LLAMA3_8B.hidden_size
    one, untied = replace(JOB, shape=tied), JOB
    assert sum(stage_weights(untied, 0)) - sum(stage_weights(one, 0)) == vocabulary
    two = replace(one, layout=Layout(pp=2))
    assert stage_weights(two, 0)[-1] == stage_weights(two, 1)[-1] == vocabulary


def test_mixed_precision_takes_18_bytes_per_weight_and_zero1_shards_12_of_them() -> None:
    plain = rank_memory(replace(JOB, layout=Layout(distributed_optimizer=False)), 0)
    weights = num_parameters(LLAMA3_8B)
    assert plain.parameters + plain.gradients + plain.optimizer == 18 * weights
    sharded = rank_memory(JOB, 0)
    assert sharded.parameters + sharded.gradients == pytest.approx(6 * weights, rel=1e-6)
    assert sharded.optimizer == pytest.approx(12 * weights / 8, rel=1e-6)


def test_buffers_are_padded_as_megatron_pads_them() -> None:
    # starts at multiples of 64, end at a multiple of lcm(3, 128)
    job = Job(TINY, Layout(), 3, 256, 3)
    assert buffer_elements(job, [65, 1, 64]) == 384
    assert buffer_elements(replace(job, layout=Layout(distributed_optimizer=False)), [65, 1, 64]) == 130


def test_one_layer_of_llama3_8b_by_hand() -> None:
    """t tokens, bf16, fused SwiGLU and norm: 2·t·(4h + Gd + (N+G)d + Nd + 3f + 4d) + 4·t·N + 8·t."""
    t, h, f, heads, groups, d = 65_536, 4096, 14336, 32, 8, 128
    elements = 4 * h + groups * d + (heads + groups) * d + heads * d + 3 * f + 4 * d
    assert sum(saved_by_layer(JOB, GPU_KERNELS).values()) == 2 * t * elements + 4 * t * heads + 8 * t


def test_fp8_keeps_two_copies_of_the_weights_of_inner_layers_beside_or_instead_of_those_in_bf16() -> None:
    bf16, fp8 = (rank_memory(replace(JOB, precision=precision), 0) for precision in ("bf16", "fp8"))
    inner = 30 * (4096 * (6144 + 4096) + 3 * 4096 * 14336)
    assert fp8.parameters - bf16.parameters == 2 * inner
    only = replace(JOB, precision="fp8", fp8_parameters=True)
    assert rank_memory(only, 0).parameters == bf16.parameters
    assert step_volume(JOB, 0).data - step_volume(only, 0).data == pytest.approx(inner * 7 / 8)
    first_of_two = replace(only, layout=Layout(pp=2), fp8_parameters=False)
    assert fp8_weights(first_of_two, 0) * 2 == inner


def test_transformer_engine_keeps_less() -> None:
    native, te = (peak_memory(replace(JOB, transformer_engine=te, recompute="none")) for te in (False, True))
    assert (
        native.activations - te.activations == 32 * 65_536 * 4 * 128 * 2
    )  # cos and sin, for queries and keys
    native, te = (
        peak_memory(replace(JOB, transformer_engine=te, recompute="selective")) for te in (False, True)
    )
    assert native.activations - te.activations == 32 * 65_536 * (4 * 128 * 2 + 4096 * 2 + 4)  # and a norm


# Peaks in GiB of the 8B model on Transformer Engine 2.11 layers, by PyTorch's allocator under tools/null_cuda.
@pytest.mark.parametrize(
    "tokens, ranks, layout, options, peak",
    [
        (64, 32, {}, {}, 76.30),
        (64, 32, {}, {"precision": "fp8"}, 88.50),
        (64, 32, {}, {"precision": "fp8", "fp8_parameters": True}, 76.31),
        (64, 32, {}, {"recompute": "block:30"}, 84.72),
        (32, 32, {}, {"recompute": "block:16"}, 124.00),
        (16, 32, {}, {"recompute": "none"}, 119.62),
        (16, 32, {}, {"recompute": "none", "precision": "fp8"}, 121.53),
        (16, 32, {}, {"recompute": "selective", "precision": "fp8"}, 83.96),
        (64, 32, {"tp": 2}, {"recompute": "none", "precision": "fp8"}, 150.17),
        (128, 32, {"tp": 4, "cp": 2, "cp_exchange": "p2p"}, {"recompute": "selective"}, 38.85),
        (128, 8, {"cp": 8, "cp_exchange": "a2a"}, {"recompute": "none"}, 132.03),
        (128, 8, {"cp": 8, "cp_exchange": "a2a+p2p"}, {"recompute": "none"}, 132.04),
        (512, 8, {"cp": 8, "cp_exchange": "p2p"}, {}, 84.71),
        (512, 8, {"cp": 8, "cp_exchange": "a2a"}, {"offload": True, "fp8_parameters": True}, 71.27),
        (512, 8, {"cp": 8, "cp_exchange": "all_gather"}, {}, 95.21),  # TE 2.20
        (512, 8, {"cp": 8, "cp_exchange": "p2p"}, {"recompute": "all_but_attention"}, 108.44),
        (
            512,
            8,
            {"cp": 8, "cp_exchange": "p2p"},
            {"recompute": "all_but_attention", "precision": "fp8"},
            120.63,
        ),
    ],
)
def test_transformer_engine_takes_the_planned_memory(tokens, ranks, layout, options, peak) -> None:
    if options.get("fp8_parameters"):
        options = {**options, "precision": "fp8"}
    layout = Layout(**layout)
    options = {"transformer_engine": True, "mixed": False, **options}
    job = Job(LLAMA3_8B, layout, ranks, tokens * 1024, ranks // layout.model_ranks, **options)
    assert peak_memory(job).total / 2**30 == pytest.approx(peak, rel=0.05)


def test_recompute_keeps_less_and_sequence_parallel_divides_the_residual_stream() -> None:
    kept = {
        mode: kept_by_layer(replace(JOB, recompute=mode), GPU_KERNELS)
        for mode in ("none", "selective", "full")
    }
    assert kept["full"] == 65_536 * 4096 * 2 < kept["selective"] < kept["none"]
    split = replace(JOB, layout=Layout(tp=4))
    assert kept_by_layer(split, GPU_KERNELS) * 4 == kept["full"]
    whole = replace(JOB, layout=Layout(tp=4, sequence_parallel=False))
    assert kept_by_layer(whole, GPU_KERNELS) == kept["full"]


def test_recomputing_a_block_lies_between_none_and_full() -> None:
    """Of 32 layers: block:0 would be none, block:32 is full; in between, bytes go in steps of one layer."""
    kept = {n: kept_by_chunk(replace(JOB, recompute=f"block:{n}"), 32, GPU_KERNELS) for n in (1, 16, 17, 32)}
    assert kept[32] == kept_by_chunk(replace(JOB, recompute="full"), 32, GPU_KERNELS)
    layer = kept_by_layer(replace(JOB, recompute="none"), GPU_KERNELS)
    assert kept[16] - kept[17] == layer - 65_536 * 4096 * 2 > 0
    assert kept[1] < 32 * layer


def test_offloaded_activations_do_not_grow_with_the_layers() -> None:
    job = replace(JOB, recompute="full")
    deeper = replace(job, shape=replace(LLAMA3_8B, num_layers=64))
    offloaded = activation_bytes(replace(job, offload=True), 0, GPU_KERNELS)
    assert offloaded == activation_bytes(replace(deeper, offload=True), 0, GPU_KERNELS)
    moved = activation_bytes(job, 0, GPU_KERNELS) - offloaded
    assert moved == 30 * 65_536 * 4096 * 2  # of 32 layers, two are on the GPU


def test_uneven_stages_hold_the_layers_they_are_given() -> None:
    job = replace(JOB, layout=Layout(pp=4, first_stage_layers=5, last_stage_layers=7))
    assert job.stage_layers == (5, 10, 10, 7)
    even = replace(JOB, layout=Layout(pp=4))
    assert sum(sum(stage_weights(job, rank)) for rank in range(4)) == sum(
        sum(stage_weights(even, rank)) for rank in range(4)
    )


@pytest.mark.parametrize(
    "pp,virtual_pp,micro_batches,expected",
    # Narayanan et al. 2021: 1F1B holds pp, pp-1, … micro-batches; interleaving 2(pp-p-1)+(v-1)pp+1 chunks.
    [(4, 1, 8, [4, 3, 2, 1]), (4, 1, 2, [2, 2, 2, 1]), (4, 2, 8, [11, 9, 7, 5]), (1, 1, 8, [1])],
)
def test_micro_batches_in_flight(pp: int, virtual_pp: int, micro_batches: int, expected: list[int]) -> None:
    job = replace(
        JOB, layout=Layout(pp=pp, virtual_pp=virtual_pp), world_size=pp, batch_sequences=micro_batches
    )
    assert [in_flight(job, rank) for rank in range(pp)] == expected


def test_memory_is_linear_in_the_sequence_and_holds_no_logits() -> None:
    """Doubling the tokens doubles what they take; the vocabulary's size does not show in bytes per token."""

    def slopes(vocab_size: int) -> list[int]:
        job = replace(JOB, shape=LLAMA3_8B.replace(vocab_size=vocab_size), layout=Layout(cp=8))
        sizes = [peak_memory(replace(job, sequence_length=2**power)).total for power in (20, 21, 22)]
        return [b - a for a, b in pairwise(sizes)]

    first, second = slopes(128_256)
    assert second == pytest.approx(2 * first, rel=0.01)
    assert slopes(2 * 128_256) == [first, second]


def test_a_512k_sequence_of_8b_fits_eight_80gb_gpus() -> None:
    """What ProLong's users could not do (its issue 16)."""
    job = replace(JOB, sequence_length=2**19, batch_sequences=16, layout=Layout(tp=4, cp=2))
    assert peak_memory(job).total < 70e9
    unsharded = replace(job, layout=Layout(cp=8, distributed_optimizer=False))
    assert peak_memory(unsharded).total > 80e9


@pytest.mark.parametrize(
    ("cp", "exchange", "ours"), [(8, "a2a", False), (16, "a2a", True), (16, "p2p", False)]
)
def test_an_exchange_that_repeats_key_value_heads_is_ours_on_transformer_engine_too(
    cp: int, exchange: str, ours: bool
) -> None:
    job = replace(JOB, transformer_engine=True, world_size=cp, layout=Layout(cp=cp, cp_exchange=exchange))
    assert (gpu_kernels(job).backward == "flash2") is ours
    per_layer = saved_by_layer(job, GPU_KERNELS)
    heads = math.lcm(cp, 8) if exchange == "a2a" else 8
    assert per_layer["values"] == job.rank_tokens * heads * 128 * 2


def test_the_loss_is_on_the_last_stage_and_the_fullest_stage_counts() -> None:
    job = replace(JOB, sequence_length=4096, loss_chunk_tokens=4096, layout=Layout(pp=4))
    ranks = [rank_memory(job, rank) for rank in range(4)]
    assert [rank.working for rank in ranks] == [layer_working(job, GPU_KERNELS)] * 3 + [loss_working(job)]
    assert ranks[3].working > ranks[0].working
    assert peak_memory(job).total == max(rank.total for rank in ranks) > min(rank.total for rank in ranks)


def test_what_an_exchange_keeps_is_kept_where_there_is_one() -> None:
    alone, split = (
        [replace(JOB, layout=Layout(cp=cp, cp_exchange=exchange)) for exchange in ("p2p", "a2a")]
        for cp in (1, 2)
    )
    assert (
        saved_by_layer(alone[0], GPU_KERNELS)
        == saved_by_layer(alone[1], GPU_KERNELS)
        == saved_by_layer(replace(alone[0], mixed=False), GPU_KERNELS)
    )
    output = split[0].rank_tokens * 32 * 128 * 2
    not_mixed, mixed = (
        saved_by_layer(replace(split[0], mixed=mixed), GPU_KERNELS)["attention"] for mixed in (False, True)
    )
    assert mixed - not_mixed == output
    assert saved_by_layer(split[1], GPU_KERNELS)["attention"] - not_mixed == output


def test_cudnns_backward_has_three_buffers_in_fp32() -> None:
    job = replace(JOB, transformer_engine=True)
    without = attention_gradients(job, replace(gpu_kernels(job), backward=""))
    assert attention_gradients(job, gpu_kernels(job)) - without == 3 * job.rank_tokens * 32 * 128 * 4


@pytest.mark.parametrize(("exchange", "sums"), [("p2p", 9), ("a2a", 33), ("a2a+p2p", 17)])
def test_a_deterministic_backward_gives_each_of_132_processors_a_sum_of_its_own(exchange, sums) -> None:
    """Of 16, 4 and 8 heads on a rank. With TE it is the same: PyTorch attends in its place."""
    layout = Layout(tp=2, cp=4, cp_exchange=exchange)
    job = replace(JOB, transformer_engine=True, deterministic=True, layout=layout)
    plain = replace(job, transformer_engine=False, deterministic=False)
    more = attention_gradients(job, gpu_kernels(job)) - attention_gradients(plain, gpu_kernels(plain))
    assert more == (sums - 1) * job.rank_tokens * 32 * 128 // 2 * 4
    flash3 = [replace(other, flash="flash3") for other in (job, plain)]
    assert len({attention_gradients(other, gpu_kernels(other)) for other in flash3}) == 1


@pytest.mark.parametrize("te", [False, True])
def test_flash_attention_3s_backward_sums_in_fp32(te: bool) -> None:
    """Of the whole sequence, as to keys and values. TE refuses this exchange: PyTorch attends there too."""
    job = replace(JOB, layout=Layout(cp=2, cp_exchange="all_gather"), transformer_engine=te, flash="flash3")
    kernels = gpu_kernels(job)
    queries, keys = job.rank_tokens * 32 * 128, 2 * job.rank_tokens * 8 * 128
    without = attention_gradients(job, replace(kernels, backward=""))
    assert attention_gradients(job, kernels) - without == queries * 4 + 2 * keys * 4
    assert kernels.rope is te

"""Settings of Megatron's TransformerConfig that change where numbers are computed and kept, but not the numbers."""

from __future__ import annotations

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from benchmarks.shapes import LLAMA3_8B
from megatron_prolong.mcore.config import fused_rotation_fits, transformer_config
from megatron_prolong.recipe.counts import padded_vocab_size
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.runtime.determinism import deterministic_kernels

K = 1024


@pytest.mark.parametrize(
    ("tp", "rank_tokens", "fits"),
    [(1, 64 * K, True), (1, 256 * K, True), (1, 512 * K, False), (2, 512 * K, True), (8, 4096 * K, False)],
)
def test_the_fused_rotation_is_not_asked_for_elements_beyond_32_bits(tp, rank_tokens, fits):
    """A row of the 8B model's products is 6144 numbers wide: 349,525 of them are 2**31 numbers."""
    assert fused_rotation_fits(LLAMA3_8B, tp, rank_tokens) is fits


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        (Layout(pp=4), [8, 8, 8, 8]),
        (Layout(pp=4, first_stage_layers=5), [5, 9, 9, 9]),
        (Layout(pp=4, first_stage_layers=7, last_stage_layers=5), [7, 10, 10, 5]),
        (Layout(pp=4, virtual_pp=2), [4, 4, 4, 4]),
    ],
    ids=["even", "first", "both ends", "virtual"],
)
def test_pipeline_stages_hold_the_layers_of_the_layout(layout, layers):
    config = transformer_config(LLAMA3_8B, layout, precision="bf16", recompute="none")
    stage = 0 if layout.virtual_pp > 1 else None
    assert [get_num_layers_to_build(config, vp_stage=stage, pp_rank=rank) for rank in range(4)] == layers
    assert layout.stage_layers(32) == tuple(layout.virtual_pp * chunk for chunk in layers)


def test_megatron_goes_by_pytorchs_switch():
    for wanted in (False, True):
        with deterministic_kernels(wanted):
            config = transformer_config(LLAMA3_8B, Layout(), precision="bf16", recompute="none")
        assert config.deterministic_mode is wanted


def test_what_is_still_being_sent_is_not_freed():
    """With several chunks a rank goes on while its output travels. Freed then, the receiver got other numbers once
    in a while, or gloo's sender died of a bad address."""
    found = [
        transformer_config(LLAMA3_8B, layout, precision="fp32", recompute="none").deallocate_pipeline_outputs
        for layout in (Layout(), Layout(pp=2), Layout(pp=2, virtual_pp=2))
    ]
    assert found == [False, True, False]


@pytest.mark.parametrize(
    ("layout", "parallel"),
    [(Layout(tp=2), True), (Layout(tp=2, sequence_parallel=False), False), (Layout(), False)],
)
def test_sequences_are_cut_where_there_is_tensor_parallelism(layout, parallel):
    config = transformer_config(LLAMA3_8B, layout, precision="bf16", recompute="none")
    assert config.sequence_parallel is parallel


@pytest.mark.parametrize(
    ("mode", "recomputed"),
    [
        ("none", (None, None, None)),
        ("selective", ("selective", None, None)),
        ("full", ("full", "uniform", 1)),
        ("block:3", ("full", "block", 3)),
    ],
)
def test_what_is_recomputed(mode, recomputed):
    config = transformer_config(LLAMA3_8B, Layout(), precision="bf16", recompute=mode)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == recomputed
    assert mode != "selective" or config.recompute_modules == ["mlp"]


def test_every_rank_holds_as_many_rows_of_the_vocabulary():
    sizes = [(128, 1), (129, 1), (128, 2), (257, 2)]
    assert [padded_vocab_size(*size) for size in sizes] == [128, 256, 256, 512]

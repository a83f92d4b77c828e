"""Settings of Megatron's TransformerConfig that depend on sizes."""

from __future__ import annotations

import pytest

from benchmarks.shapes import LLAMA3_8B
from megatron_prolong.mcore.config import fused_rotation_fits

K = 1024


@pytest.mark.parametrize(
    ("tp", "rank_tokens", "fits"),
    [(1, 64 * K, True), (1, 256 * K, True), (1, 512 * K, False), (2, 512 * K, True), (8, 4096 * K, False)],
)
def test_the_fused_rotation_is_not_asked_for_elements_beyond_32_bits(tp, rank_tokens, fits):
    """A row of the 8B model's products is 6144 numbers wide: 349,525 of them are 2**31 numbers."""
    assert fused_rotation_fits(LLAMA3_8B, tp, rank_tokens) is fits

"""Frequencies and angles against transformers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_prolong.model.rope import angles, inverse_frequencies
from megatron_prolong.recipe.rope import Llama3Scaling, RopeScaling, YarnScaling, yarn_attention_factor

LLAMA_31 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)
LLAMA_32 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)


YARN = YarnScaling(factor=16.0, original_max_length=4096, attention_factor=yarn_attention_factor(16.0))
ULTRALONG = YarnScaling(  # arXiv 2504.06214, section 2.1: alpha 1, beta 4, scale 128 for 1M tokens
    factor=128.0, original_max_length=8192, beta_fast=4.0, attention_factor=yarn_attention_factor(128.0)
)
# Ramps that begin before the first pair, end with it, and end behind the last.
EDGES = [
    YarnScaling(factor=4.0, original_max_length=length, beta_slow=slow, attention_factor=1.0)
    for length, slow in ((64, 1.0), (4, 1.0), (2**19, 1.0), (4096, 1e-6))
]
ODD_YARN = YarnScaling(factor=4.0, original_max_length=1000, attention_factor=1.7, truncate=False)


def transformers_rotary(head_dim: int, base: float, scaling: RopeScaling | None) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", **(scaling.to_hf() if scaling else {}), "rope_theta": base}
    return LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 8e6, 1.28e8])
@pytest.mark.parametrize("scaling", [None, LLAMA_31, LLAMA_32, YARN, ULTRALONG, ODD_YARN, *EDGES])
def test_equal_to_transformers(head_dim, base, scaling):
    rotary = transformers_rotary(head_dim, base, scaling)
    ours = inverse_frequencies(head_dim, base, scaling)
    assert torch.equal(ours, rotary.inv_freq)
    positions = torch.tensor([0, 1, 2, 0, 1, 8191, 131072, 2**19 - 1])
    turned = angles(positions, ours)
    assert turned.shape == (8, 1, 1, head_dim) and turned.dtype == torch.float32
    cos, sin = rotary(torch.zeros(1), positions[None])
    factor = scaling.attention_factor if scaling else 1.0  # transformers rotates and stretches in one
    assert rotary.attention_scaling == factor
    assert torch.equal(turned[:, 0, 0].cos() * factor, cos[0])
    assert torch.equal(turned[:, 0, 0].sin() * factor, sin[0])


def test_scaling_changes_only_long_waves():
    plain, scaled = (inverse_frequencies(128, 5e5, scaling) for scaling in (None, LLAMA_31))
    wavelengths = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    assert torch.equal(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    assert between.any() and (scaled[between] < plain[between]).all()

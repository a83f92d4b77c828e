"""Frequencies and angles against transformers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_prolong.model.rope import angles, inverse_frequencies
from megatron_prolong.recipe.shape import RopeScaling

LLAMA_31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)
LLAMA_32 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)


def transformers_rotary(head_dim: int, base: float, scaling: RopeScaling | None) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": "default", "rope_theta": base}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    return LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters))


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 8e6, 1.28e8])
@pytest.mark.parametrize("scaling", [None, LLAMA_31, LLAMA_32])
def test_equal_to_transformers(head_dim, base, scaling):
    rotary = transformers_rotary(head_dim, base, scaling)
    ours = inverse_frequencies(head_dim, base, scaling)
    assert torch.equal(ours, rotary.inv_freq)
    positions = torch.tensor([0, 1, 2, 0, 1, 8191, 131072, 2**19 - 1])
    turned = angles(positions, ours)
    assert turned.shape == (8, 1, 1, head_dim) and turned.dtype == torch.float32
    cos, sin = rotary(torch.zeros(1), positions[None])
    assert torch.equal(turned[:, 0, 0].cos(), cos[0])
    assert torch.equal(turned[:, 0, 0].sin(), sin[0])


def test_scaling_changes_only_long_waves():
    plain, scaled = (inverse_frequencies(128, 5e5, scaling) for scaling in (None, LLAMA_31))
    wavelengths = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    assert torch.equal(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    between = (wavelengths > 2048) & (wavelengths < 8192)
    assert between.any() and (scaled[between] < plain[between]).all()

"""Rotary position embedding: frequencies with Llama-3.1's scaling or YaRN's, and the angles of given positions.

Su et al. 2021; the numbers and the order of the floating-point operations are transformers'
(`LlamaRotaryEmbedding`, `_compute_llama3_parameters`, `_compute_yarn_parameters`), so the angles are equal to the
last bit. Angles are made from positions, not from offsets: they restart with each document and follow tokens
through context-parallel slicing. Cost: T x D fp32 numbers, once per batch.

That YaRN also sharpens attention is ModelShape.softmax_scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prolong.recipe.rope import Llama3Scaling, RopeScaling, YarnScaling


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, fp32 [head_dim / 2]."""
    waves = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if isinstance(scaling, YarnScaling):
        return _interpolate(waves, base, scaling)
    return _stretch(1.0 / waves, scaling) if scaling else 1.0 / waves


def _stretch(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Waves longer than `original_max_length / low_freq_factor` are stretched by `factor`, those shorter than
    `original_max_length / high_freq_factor` are kept, and those between are interpolated."""
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_length
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > length / low, wavelengths < length / high
    kept = (length / wavelengths - low) / (high - low)
    interpolated = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    stretched = torch.where(is_long, frequencies / scaling.factor, frequencies)
    return torch.where(is_long | is_short, stretched, interpolated)


def _interpolate(waves: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    """As `_stretch`, but on a ramp that is linear in the number of the pair, from the one that turns `beta_fast`
    times within the original length to the one that turns `beta_slow` times."""
    pairs = len(waves)

    def pair_that_turns(times: float) -> float:
        return (
            2 * pairs * math.log(scaling.original_max_length / (times * 2 * math.pi)) / (2 * math.log(base))
        )

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # transformers', though there are only half as many
    if first == last:
        last += 0.001
    slowed = ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - slowed
    return 1.0 / (scaling.factor * waves) * (1 - kept) + 1.0 / waves * kept


def angles(positions_T: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotation angle of every position and dimension, fp32 [T, 1, 1, head_dim].

    The layout of Megatron's `apply_rotary_pos_emb`: the half [head_dim / 2] twice, one after the other. fp32
    is what transformers and Megatron use: at position 2**19 angles of fast pairs are exact to about 0.03.
    """
    half_TD = positions_T.float().unsqueeze(-1) * inverse_frequencies
    return torch.cat((half_TD, half_TD), dim=-1)[:, None, None, :]

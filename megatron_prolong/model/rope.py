"""Rotary position embedding: frequencies with Llama-3.1's scaling, and the angles of given positions.

Su et al. 2021; the numbers and the order of the floating-point operations are transformers'
(`LlamaRotaryEmbedding`, `_compute_llama3_parameters`), so the angles are equal to the last bit. Angles are
made from positions, not from offsets: they restart with each document and follow tokens through
context-parallel slicing. Cost: T x D fp32 numbers, once per batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prolong.recipe.shape import RopeScaling


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, fp32 [head_dim / 2].

    With `scaling` (Llama 3.1's "llama3" rope type), waves longer than `original_max_length / low_freq_factor`
    are stretched by `factor`, those shorter than `original_max_length / high_freq_factor` are kept, and those
    between are interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (base**exponents)
    return frequencies if scaling is None else _stretch(frequencies, scaling)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_length
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > length / low, wavelengths < length / high
    kept = (length / wavelengths - low) / (high - low)
    interpolated = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    stretched = torch.where(is_long, frequencies / scaling.factor, frequencies)
    return torch.where(is_long | is_short, stretched, interpolated)


def angles(positions_T: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotation angle of every position and dimension, fp32 [T, 1, 1, head_dim].

    The layout of Megatron's `apply_rotary_pos_emb`: the half [head_dim / 2] twice, one after the other. fp32
    is what transformers and Megatron use: at position 2**19 angles of fast pairs are exact to about 0.03.
    """
    half_TD = positions_T.float().unsqueeze(-1) * inverse_frequencies
    return torch.cat((half_TD, half_TD), dim=-1)[:, None, None, :]

"""Model FLOPs of a training step, by the documents' real lengths: what MFU counts.

They are what the mathematics needs, forward and twice that backward. What is executed (time.py) is more: what is
recomputed, and the scores again in the flash backward.
"""

from __future__ import annotations

from megatron_prolong.recipe.counts import ForwardFlops
from megatron_prolong.recipe.shape import ModelShape


def model_flops(shape: ModelShape, tokens: float, pairs: float) -> float:
    """Model FLOPs (forward and backward) of `tokens` tokens whose documents' Σ len² is `pairs`."""
    forward = ForwardFlops.of(shape)
    per_token = forward.layers_per_token + forward.output_per_token
    return 3 * (per_token * tokens + forward.attention_per_pair * pairs)

"""Floating-point operations of a training step, by the documents' real lengths.

Two counts, never to be mixed:
- *model* FLOPs: what the mathematics needs (forward, and twice that backward); MFU is these over the peak.
- *hardware* FLOPs: what is executed: recomputation too, and the scores again inside the flash backward (2.5 times
  the forward, Dao 2023 section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prolong.plan.job import Job
from megatron_prolong.recipe.counts import ForwardFlops
from megatron_prolong.recipe.shape import ModelShape

FLASH_BACKWARD = 2.5  # backward over forward: five products instead of two


def model_flops(shape: ModelShape, tokens: float, pairs: float) -> float:
    """Model FLOPs (forward and backward) of `tokens` tokens whose documents' Σ len² is `pairs`."""
    forward = ForwardFlops.of(shape)
    per_token = forward.layers_per_token + forward.output_per_token
    return 3 * (per_token * tokens + forward.attention_per_pair * pairs)


@dataclass(frozen=True)
class Passes:
    """How often each part of the forward's work is executed, in forward's FLOPs, in one step."""

    layers: float
    mlp_again: float
    output: float
    attention_forward: float
    attention_backward: float


def passes(job: Job) -> Passes:
    """Executed passes under the job's recomputation; the chunked loss never makes its logits twice."""
    return Passes(
        layers=3.0 + job.recomputed_share,
        mlp_again=1.0 if job.recompute == "selective" else 0.0,
        output=3.0,
        attention_forward=1.0 + job.attention_again,
        attention_backward=FLASH_BACKWARD,
    )

"""What a document costs: linear in its tokens, quadratic through attention, and an exchange when it is split.

Only ratios matter to balancing; the default is in seconds of one H100 so that numbers can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.recipe.counts import ForwardFlops
from megatron_prolong.recipe.shape import ModelShape

Lengths = NDArray[np.int64]
Seconds = NDArray[np.float64]

# One H100 with full recomputation, bf16. Matrix products run at 70% of 989 TFLOP/s in 4 passes (forward, again,
# twice backward); causal attention at 539 TFLOP/s forward, twice, and 516 backward, which is 2.5 forwards
# (arXiv 2407.08608, figures 5 and 6: cuDNN). Keys and values travel three times (gathered forward and again
# backward, gradients reduced) at 80% of NVLink's 450 GB/s.
_MATMUL_SECONDS = 4 / 692e12
_ATTENTION_SECONDS = 2 / 539e12 + 2.5 / 516e12
_EXCHANGE_SECONDS = 3 / 360e9


@dataclass(frozen=True)
class CostModel:
    """Time of a step, in seconds, on one rank that does all of it.

    Attributes:
        linear: per token: everything but attention.
        quadratic: per token² of a document: causal attention.
        exchange: per token of a document whose keys and values travel to every rank of the context-parallel
            group. Each rank receives (cp-1)/cp of the document, so this part does not shrink with cp.
    """

    linear: float
    quadratic: float
    exchange: float = 0.0

    def __post_init__(self) -> None:
        assert self.linear > 0 and min(self.quadratic, self.exchange) >= 0, self

    @classmethod
    def for_shape(cls, shape: ModelShape) -> CostModel:
        """From a Llama's operations and bytes at an H100's speeds."""
        forward = ForwardFlops.of(shape)
        kv_bytes = 2 * shape.num_kv_heads * shape.head_dim * 2
        return cls(
            linear=(forward.layers_per_token + forward.output_per_token) * _MATMUL_SECONDS,
            quadratic=forward.attention_per_pair * _ATTENTION_SECONDS,
            exchange=shape.num_layers * kv_bytes * _EXCHANGE_SECONDS,
        )

    @property
    def equal_cost_tokens(self) -> float:
        """Length at which a document's attention costs as much as all else (inf without a quadratic term)."""
        return self.linear / self.quadratic if self.quadratic else float("inf")

    def work(self, lengths: Lengths) -> Seconds:
        """Time of each document whole on one rank."""
        n = lengths.astype(np.float64)
        return self.linear * n * (1 + n / self.equal_cost_tokens)

    def exchange_time(self, tokens: Any, cp: int) -> Any:
        """Time on every rank of exchanging documents of `tokens` tokens in all (number or array) over cp ranks."""
        return self.exchange * tokens * (cp - 1) / cp

"""Does the model use a longer context? Loss of the same tokens given more and more of what precedes them.

Every passage has as many tokens as the longest context. For each context length L the model sees only the last
L tokens of the passage. Two readings come out of it: the mean loss of the passage's last tokens, which are the
same at every L, so that only the context differs; and, at the longest L, the loss by position, in buckets
that double.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.evaluation.backend import ScoringBackend, batches
from megatron_prolong.evaluation.documents import Passage
from megatron_prolong.runtime.progress import track

MAX_WINDOW_TOKENS = 256


@dataclass(frozen=True)
class ContextLoss:
    """Nats per token of the passages' last `window` tokens given `context` tokens up to their end."""

    context: int
    loss: float
    passage_losses: tuple[float, ...]


@dataclass(frozen=True)
class BucketLoss:
    """Nats per token at positions start ≤ p < end of the longest context, mean over passages."""

    start: int
    end: int
    loss: float
    passage_losses: tuple[float, ...]


@dataclass(frozen=True)
class Perplexity:
    """What `measure` finds for one model.

    Attributes:
        tokens: a digest of the passages' tokens: losses per token compare only where these are the same.
        tokenizer: the model's, as a reader may know it.
    """

    tokens: str
    tokenizer: str
    window: int
    by_context: tuple[ContextLoss, ...]
    by_position: tuple[BucketLoss, ...]


def measure(backend: ScoringBackend, passages: Sequence[Passage], lengths: Sequence[int]) -> Perplexity:
    """Losses at every context length; all passages must have max(lengths) tokens.

    Cost: one forward pass over each passage per length.
    """
    lengths = sorted(set(lengths))
    assert all(len(passage.tokens) == lengths[-1] for passage in passages)
    window = min(MAX_WINDOW_TOKENS, lengths[0] // 2)
    losses: dict[int, list[NDArray[np.float32]]] = {length: [] for length in lengths}
    work = [(some, length) for length in lengths for some in batches(passages, backend.batch_size)]
    total = len(passages) * sum(lengths)
    for some, length in track(work, total, "perplexity", amount=lambda item: len(item[0]) * item[1]):
        found = backend.token_logprobs([passage.tokens[-length:].tolist() for passage in some])
        losses[length] += [-logprobs for logprobs in found]
    tokenizer = backend.tokenizer
    return Perplexity(
        tokens=hashlib.sha256(np.stack([passage.tokens for passage in passages]).tobytes()).hexdigest(),
        tokenizer=f"{tokenizer.name_or_path} of {len(tokenizer):,} tokens",
        window=window,
        by_context=tuple(_at_context(length, losses[length], window) for length in lengths),
        by_position=tuple(_buckets(np.stack(losses[lengths[-1]]))),
    )


def _at_context(length: int, losses: Sequence[NDArray[np.float32]], window: int) -> ContextLoss:
    means = [float(passage[-window:].astype(np.float64).mean()) for passage in losses]
    return ContextLoss(length, float(np.mean(means)), tuple(means))


def _buckets(losses_PT: NDArray[np.float32]) -> list[BucketLoss]:
    """Position p is that of the predicted token: 1 … T. Buckets [1, 128), [128, 256), [256, 512), …"""
    length = losses_PT.shape[1] + 1
    edges = [1]
    while edges[-1] < length:
        edges.append(min(max(128, 2 * edges[-1]), length))
    buckets = []
    for start, end in pairwise(edges):
        means = losses_PT[:, start - 1 : end - 1].astype(np.float64).mean(axis=1)
        buckets.append(BucketLoss(start, end, float(means.mean()), tuple(means.tolist())))
    return buckets

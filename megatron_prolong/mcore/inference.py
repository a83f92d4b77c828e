"""A checkpoint in place for evaluation: log-probabilities and greedy generation without a conversion.

Prompts are fed in chunks against a key/value cache, so memory grows with the cache and never with a whole
context's activations or logits. Several sequences are decoded together: their tokens share the matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.data.batch import NO_LABEL
from megatron_prolong.mcore.attention import Documents, KeyValueCache
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import load_weights
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import read_shape

PREFILL_TOKENS = 4096  # long enough for full matrix products, short enough to keep activations small


@dataclass(frozen=True)
class InferenceModel:
    """A loaded model. Every rank of the layout makes the same calls and gets the same answers."""

    model: StageModel
    device: torch.device

    @torch.inference_mode()
    def token_logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token given those before it: fp32 [len(ids) − 1], on CPU."""
        return self._logprobs(ids, KeyValueCache())

    @torch.inference_mode()
    def continuation_logprobs(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Log-probability of each whole continuation after the prompt, which is read only once."""
        cache = KeyValueCache()
        if len(prompt) > 1:
            self._prefill(prompt[:-1], cache)
        totals = []
        for continuation in continuations:
            logprobs = self._logprobs([prompt[-1], *continuation], cache)
            totals.append(float(logprobs.double().sum()))
            cache.length = len(prompt) - 1
        return totals

    def _logprobs(self, ids: Sequence[int], cache: KeyValueCache) -> Tensor:
        """Log-probabilities of ids[1:] after what the cache holds: fp32 [len(ids) − 1], on CPU."""
        tokens = torch.tensor(ids, device=self.device)
        labels = torch.cat([tokens[1:], tokens.new_full((1,), NO_LABEL)])
        losses = []
        for start in range(0, len(ids), PREFILL_TOKENS):
            chunk = slice(start, start + PREFILL_TOKENS)
            losses.append(self._forward([tokens[chunk]], [cache], labels[chunk])[0])
        return -torch.cat(losses)[:-1].cpu()

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, without the prompt and without the stop token."""
        caches = [KeyValueCache() for _ in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        following = [self._prefill(prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)]
        active = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            active = [index for index in active if following[index] not in stop_ids]
            if not active:
                break
            for index in active:
                outputs[index].append(following[index])
            news = [torch.tensor([following[index]], device=self.device) for index in active]
            logits_DV = self._forward(news, [caches[index] for index in active])
            for index, token in zip(active, logits_DV.argmax(-1).tolist(), strict=True):
                following[index] = token
        return outputs

    def _prefill(self, prompt: Sequence[int], cache: KeyValueCache) -> int:
        """Feed a prompt; returns the most likely next token."""
        tokens = torch.tensor(prompt, device=self.device)
        for chunk in tokens.split(PREFILL_TOKENS):
            logits_DV = self._forward([chunk], [cache])
        return int(logits_DV[-1].argmax())

    def _forward(
        self, news: Sequence[Tensor], caches: Sequence[KeyValueCache], labels: Tensor | None = None
    ) -> Tensor:
        """One pass over each sequence's new tokens: logits [D, V] of the last ones, or losses [1, T]."""
        lengths = [len(new) for new in news]
        positions = torch.cat(
            [
                torch.arange(cache.length, cache.length + length)
                for cache, length in zip(caches, lengths, strict=True)
            ]
        )
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        output = self.model.chunks[0](
            torch.cat(list(news)).unsqueeze(0),
            positions.unsqueeze(0).to(self.device),
            None,
            labels=None if labels is None else labels.unsqueeze(0),
            packed_seq_params=Documents(cu_seqlens=cu_seqlens, caches=tuple(caches)),
            runtime_gather_output=True,
        )
        for cache, length in zip(caches, lengths, strict=True):
            cache.advance(length)
        return output if labels is not None else output[0, :, : self.model.shape.vocab_size]


def load_for_inference(
    checkpoint: Path, layout: Layout, device: torch.device, precision: str
) -> InferenceModel:
    """Load a checkpoint directory of ours inside `mcore.groups.megatron(layout, …)`.

    Args:
        layout: tp of any size; pp and cp must be 1 (keys and values are cached where the queries are).
    """
    assert layout.pp == layout.cp == 1 and (layout.tp == 1 or not layout.sequence_parallel)
    model = build_model(read_shape(checkpoint), layout, precision=precision, training=False)
    load_weights(checkpoint, model)
    for chunk in model.chunks:
        chunk.eval()
    return InferenceModel(model, device)

"""A checkpoint in place for evaluation: log-probabilities and greedy generation without a conversion.

Prompts are fed in chunks against a key/value cache, so memory grows with the cache and never with a whole
context's activations or logits. Several sequences are decoded together: their tokens share the matrix products.
Context-parallel ranks share the work of a prefill and the memory of the cache (`model/spread_cache.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.data.batch import NO_LABEL
from megatron_prolong.mcore.attention import Documents, KeyValueCache, Spread
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import load_weights
from megatron_prolong.mcore.cpu import without_cuda_on_cpu
from megatron_prolong.mcore.groups import Axis, ParallelGroups
from megatron_prolong.model.spread_cache import can_slice, gather_slices, slice_of
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import read_shape

PREFILL_TOKENS = 4096  # long enough for full matrix products, short enough to keep activations small


@dataclass(frozen=True)
class InferenceModel:
    """A loaded model. Every rank of the layout makes the same calls and gets the same answers.

    Attributes:
        cp: the ranks that share each cache.
    """

    model: StageModel
    device: torch.device
    cp: Axis

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
        self._read(torch.tensor(prompt[:-1], device=self.device), cache)
        mark = cache.length, cache.position
        totals = []
        for continuation in continuations:
            logprobs = self._logprobs([prompt[-1], *continuation], cache)
            totals.append(float(logprobs.double().sum()))
            cache.length, cache.position = mark
        return totals

    def _logprobs(self, ids: Sequence[int], cache: KeyValueCache) -> Tensor:
        """Log-probabilities of ids[1:] after what the cache holds: fp32 [len(ids) − 1], on CPU."""
        tokens = torch.tensor(ids, device=self.device)
        labels = torch.cat([tokens[1:], tokens.new_full((1,), NO_LABEL)])
        chunks = zip(tokens.split(self._chunk_tokens), labels.split(self._chunk_tokens), strict=True)
        losses = [self._losses(some, their_labels, cache) for some, their_labels in chunks]
        return -torch.cat(losses)[:-1].cpu()

    def _losses(self, tokens: Tensor, labels: Tensor, cache: KeyValueCache) -> Tensor:
        """Losses of one chunk, [T], on every rank."""
        if not self._slices(len(tokens)):
            return self._forward([tokens], [cache], labels)[0]
        mine = slice_of(len(tokens), self.cp.rank, self.cp.size)
        losses = self._forward([tokens[mine]], [cache], labels[mine], chunk_tokens=len(tokens))[0]
        return gather_slices(losses, len(tokens), self.cp.group)[: len(tokens)]

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, without the prompt and without the stop token."""
        caches = [KeyValueCache() for _ in prompts]
        outputs = [[self._prefill(prompt, cache)] for prompt, cache in zip(prompts, caches, strict=True)]
        active = list(range(len(prompts)))
        for _ in range(max_new_tokens - 1):
            active = [index for index in active if outputs[index][-1] not in stop_ids]
            if not active:
                break
            news = [torch.tensor(outputs[index][-1:], device=self.device) for index in active]
            logits_DV = self._forward(news, [caches[index] for index in active])
            for index, token in zip(active, logits_DV.argmax(-1).tolist(), strict=True):
                outputs[index].append(token)
        return [output[:-1] if output[-1] in stop_ids else output for output in outputs]

    def _prefill(self, prompt: Sequence[int], cache: KeyValueCache) -> int:
        """Feed a prompt; returns the most likely next token."""
        tokens = torch.tensor(prompt, device=self.device)
        # Slices leave the last token's logits on one rank, so that token goes apart, to all of them.
        apart = 1 if self.cp.size > 1 else min(len(tokens), PREFILL_TOKENS)
        self._read(tokens[:-apart], cache)
        return int(self._forward([tokens[-apart:]], [cache])[-1].argmax())

    def _read(self, tokens: Tensor, cache: KeyValueCache) -> None:
        """Feed tokens chunk by chunk."""
        for chunk in tokens.split(self._chunk_tokens) if len(tokens) else ():
            if self._slices(len(chunk)):
                mine = slice_of(len(chunk), self.cp.rank, self.cp.size)
                self._forward([chunk[mine]], [cache], chunk_tokens=len(chunk))
            else:
                self._forward([chunk], [cache])

    @property
    def _chunk_tokens(self) -> int:
        return PREFILL_TOKENS * self.cp.size

    def _slices(self, num_tokens: int) -> bool:
        return self.cp.size > 1 and can_slice(num_tokens, self.cp.size)

    def _forward(
        self,
        news: Sequence[Tensor],
        caches: Sequence[KeyValueCache],
        labels: Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """One pass over each sequence's new tokens: logits [D, V] of the last ones, or losses [1, T].

        Args:
            chunk_tokens: `news` is this rank's slice of so many tokens of one sequence.
        """
        lengths = [len(new) for new in news]
        offset = slice_of(chunk_tokens, self.cp.rank, self.cp.size).start if chunk_tokens else 0
        positions = torch.cat(
            [
                torch.arange(cache.position + offset, cache.position + offset + length)
                for cache, length in zip(caches, lengths, strict=True)
            ]
        )
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        # Tokens that every rank has are kept by one rank after the other.
        keeps = tuple(
            chunk_tokens is not None or cache.position % self.cp.size == self.cp.rank for cache in caches
        )
        spread = Spread(self.cp.group, chunk_tokens, keeps) if self.cp.size > 1 else None
        with without_cuda_on_cpu():
            output = self.model.chunks[0](
                torch.cat(list(news)).unsqueeze(0),
                positions.unsqueeze(0).to(self.device),
                None,
                labels=None if labels is None else labels.unsqueeze(0),
                packed_seq_params=Documents(cu_seqlens=cu_seqlens, caches=tuple(caches), spread=spread),
                runtime_gather_output=True,
            )
        for cache, length, kept in zip(caches, lengths, keeps, strict=True):
            cache.advance(length if kept else 0, chunk_tokens or length)
        return output if labels is not None else output[0, :, : self.model.shape.vocab_size]


def load_for_inference(
    checkpoint: Path, layout: Layout, groups: ParallelGroups, device: torch.device, precision: str
) -> InferenceModel:
    """Load a checkpoint directory of ours inside `mcore.groups.megatron(layout, …)`.

    Args:
        layout: tp and cp of any size, pp 1; cp is ours alone, Megatron's modules take their tokens as they come.
    """
    assert layout.pp == 1 and (layout.tp == 1 or not layout.sequence_parallel)
    alone = layout.model_copy(update={"cp": 1})
    model = build_model(read_shape(checkpoint), alone, precision=precision, training=False)
    load_weights(checkpoint, model)
    for chunk in model.chunks:
        chunk.eval()
    return InferenceModel(model, device, groups.cp)

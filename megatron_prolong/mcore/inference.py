"""A checkpoint in place for evaluation: log-probabilities and greedy generation without a conversion.

Prompts are fed in chunks against a key/value cache, so memory grows with the cache and never with a whole
context's activations or logits. Several sequences are decoded together: their tokens share the matrix products.
Context-parallel ranks share the work of a prefill and the memory of the cache (`model/spread_cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
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

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""A prompt and what may follow it, as tokens."""

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
    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each sequence, the log-probability of each token given those before it: fp32 [len − 1], on CPU."""
        return self._logprobs(sequences, [KeyValueCache() for _ in sequences])

    @torch.inference_mode()
    def continuation_logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """Log-probability of each whole continuation after its prompt; every prompt is read once."""
        caches = [KeyValueCache() for _ in questions]
        self._read([prompt[:-1] for prompt, _ in questions], caches)
        marks = [(cache.length, cache.position) for cache in caches]
        totals: list[list[float]] = [[] for _ in questions]
        for turn in range(max((len(continuations) for _, continuations in questions), default=0)):
            asked = [index for index, (_, continuations) in enumerate(questions) if turn < len(continuations)]
            sequences = [[questions[index][0][-1], *questions[index][1][turn]] for index in asked]
            found = self._logprobs(sequences, [caches[index] for index in asked])
            for index, logprobs in zip(asked, found, strict=True):
                totals[index].append(float(logprobs.double().sum()))
                caches[index].length, caches[index].position = marks[index]
        return totals

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ended: Callable[[Sequence[int]], bool] = lambda output: False,
    ) -> list[list[int]]:
        """Greedy continuation of every prompt, without the prompt, until it has `ended`."""
        caches = [KeyValueCache() for _ in prompts]
        self._read([prompt[:-1] for prompt in prompts], caches)
        outputs: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            if not active:
                break
            news = self._tensors([(outputs[index] or prompts[index])[-1:] for index in active])
            logits_DV = self._forward(news, [caches[index] for index in active])
            for index, token in zip(active, logits_DV.argmax(-1).tolist(), strict=True):
                outputs[index].append(token)
            active = [index for index in active if not ended(outputs[index])]
        return outputs

    def _logprobs(self, sequences: Sequence[Sequence[int]], caches: Sequence[KeyValueCache]) -> list[Tensor]:
        """Of each sequence's tokens but the first, after what its cache holds: fp32 [len − 1], on CPU."""
        tokens = self._tensors(sequences)
        labels = [torch.cat([ids[1:], ids.new_full((1,), NO_LABEL)]) for ids in tokens]
        pieces: list[list[Tensor]] = [[] for _ in sequences]
        for some, part in self._passes(tokens):
            news = [tokens[index][part] for index in some]
            losses = self._pass(
                news, [caches[index] for index in some], [labels[index][part] for index in some]
            )
            for index, piece in zip(some, losses.split([len(new) for new in news]), strict=True):
                pieces[index].append(-piece)
        return [torch.cat(some)[:-1].cpu() for some in pieces]

    def _read(self, sequences: Sequence[Sequence[int]], caches: Sequence[KeyValueCache]) -> None:
        """Feed each sequence to its cache."""
        tokens = self._tensors(sequences)
        for some, part in self._passes(tokens):
            self._pass([tokens[index][part] for index in some], [caches[index] for index in some])

    def _passes(self, tokens: Sequence[Tensor]) -> Iterator[tuple[list[int], slice]]:
        """Which sequences to feed at once, and what of them: short ones whole and together, a long one in chunks.

        Context-parallel ranks take one at a time, to slice it.
        """
        group: list[int] = []
        for index, ids in enumerate(tokens):
            room = self._chunk_tokens - sum(len(tokens[other]) for other in group)
            if group and (self.cp.size > 1 or len(ids) > room):
                yield group, slice(None)
                group = []
            if len(ids) <= self._chunk_tokens:
                group += [index] if len(ids) else []
                continue
            for start in range(0, len(ids), self._chunk_tokens):
                yield [index], slice(start, start + self._chunk_tokens)
        if group:
            yield group, slice(None)

    def _pass(
        self, tokens: Sequence[Tensor], caches: Sequence[KeyValueCache], labels: Sequence[Tensor] = ()
    ) -> Tensor:
        """Feed these tokens; with labels, their losses one after another, [T], on every rank."""
        num_tokens = len(tokens[0])
        if len(tokens) > 1 or self.cp.size == 1 or not can_slice(num_tokens, self.cp.size):
            return self._forward(tokens, caches, torch.cat(list(labels)) if labels else None)[0]
        mine = slice_of(num_tokens, self.cp.rank, self.cp.size)
        own_labels = labels[0][mine] if labels else None
        output = self._forward([tokens[0][mine]], caches, own_labels, chunk_tokens=num_tokens)[0]
        return gather_slices(output, num_tokens, self.cp.group)[:num_tokens] if labels else output

    def _tensors(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return [torch.tensor(sequence, dtype=torch.long, device=self.device) for sequence in sequences]

    @property
    def _chunk_tokens(self) -> int:
        return PREFILL_TOKENS * self.cp.size

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
                packed_seq_params=Documents(
                    cu_seqlens=(0, *accumulate(lengths)), caches=tuple(caches), spread=spread
                ),
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

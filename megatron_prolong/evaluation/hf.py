"""The Hugging Face backend: transformers on CPU or one GPU, with chunked prefill.

Contexts are fed in chunks against a key/value cache, so logits exist for one chunk at a time and memory grows
with the cache only. RoPE that depends on the length ("longrope", "dynamic") wants them whole. This is the
reference the megatron backend is tested against.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, batches, encode, refuse_nan
from megatron_prolong.evaluation.ending import Ending, stop_tokens

if TYPE_CHECKING:
    from megatron_prolong.mcore.inference import Question

# Logits of one chunk: 1024 × 128K vocabulary × 4 bytes = 0.5 GiB.
SCORE_CHUNK_TOKENS = 1024
PREFILL_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class HuggingFaceBackend:
    """A causal language model of transformers; greedy, float32 on CPU and bfloat16 on CUDA."""

    module: Any
    ending: Ending
    model: str
    max_length: int
    batch_size: int = 1
    name: str = "hf"

    @classmethod
    def open(cls, directory: Path, *, batch_size: int = 1) -> HuggingFaceBackend:
        """Load a directory written by `save_pretrained` (or by `prolong convert to-hf`).

        Raises:
            UserError: transformers does not take it, weights are missing, or its logits are NaN.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            module, found = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{directory}: transformers cannot load this model: {error}") from error
        if found["missing_keys"]:
            raise UserError.many(
                f"{directory}: weights are missing, which transformers would make up at random; copy it again:",
                sorted(found["missing_keys"]),
            )
        if (penalty := module.generation_config.repetition_penalty) not in (None, 1.0):
            print(
                f"warning: {directory}: generation_config.json asks for repetition_penalty {penalty}, which HELMET "
                "applies and this greedy choice does not",
                file=sys.stderr,
            )
        backend = cls(
            module=module.to(device).eval(),
            ending=Ending(directory, stop_tokens(module.generation_config.eos_token_id)),
            model=str(directory),
            max_length=int(module.config.max_position_embeddings),
            batch_size=batch_size,
        )
        refuse_nan(backend)
        return backend

    @property
    def tokenizer(self) -> Any:
        """See `Backend`."""
        return self.ending.tokenizer

    @torch.inference_mode()
    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """See `ScoringBackend`; the logits of at most SCORE_CHUNK_TOKENS positions exist at a time."""
        return [self._logprobs(self._tensor([ids]), _new_cache()).cpu().numpy() for ids in sequences]

    @torch.inference_mode()
    def continuation_logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """See `ScoringBackend`: a prompt's keys and values serve all its continuations."""
        return [self._continuation_logprobs(*question) for question in questions]

    def _continuation_logprobs(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        cache = _new_cache()
        if len(prompt) > 1:
            self._prefill(self._tensor([prompt[:-1]]), None, cache)
        totals = []
        for continuation in continuations:
            ids = self._tensor([[prompt[-1], *continuation]])
            totals.append(float(self._logprobs(ids, cache).double().sum()))
            cache.crop(-len(continuation))
        return totals

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Backend`; prompts of similar length share a batch, padded on the left."""
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        texts = [""] * len(encoded)
        for batch in batches(order, self.batch_size):
            outputs = self._generate_batch([encoded[index] for index in batch], max_new_tokens, stop)
            for index, output in zip(batch, outputs, strict=True):
                texts[index] = self.ending.text(output, stop)
        return texts

    @torch.inference_mode()
    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[int]]:
        """Greedy tokens of prompts decoded side by side, up to the one that ends each."""
        width = max(map(len, prompts))
        pad = min(self.ending.stop_ids, default=0)  # any token: padding is masked out
        ids_BT = self._tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = self._tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        padded = any(len(prompt) != width for prompt in prompts)
        cache = _new_cache()
        following = self._prefill(ids_BT, mask_BT if padded else None, cache)
        outputs = [[token] for token in following.tolist()]
        for _ in range(max_new_tokens - 1):
            ended = [self.ending.reached(output, stop) for output in outputs]
            if all(ended):
                break
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], dim=1)
            following = self._forward(following[:, None], mask_BT if padded else None, cache)
            for output, token, over in zip(outputs, following.tolist(), ended, strict=True):
                if not over:
                    output.append(token)
        return outputs

    def _prefill(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: Any) -> Tensor:
        """Feed the prompts chunk by chunk; returns the most likely next token of each, [B]."""
        for start, end in self._chunks(ids_BT.shape[1], PREFILL_CHUNK_TOKENS):
            seen = None if mask_BT is None else mask_BT[:, :end]
            following = self._forward(ids_BT[:, start:end], seen, cache)
        return following

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor | None, cache: Any) -> Tensor:
        positions = None
        if mask_BT is not None:  # positions count real tokens only
            positions = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        logits_B1V = self.module(
            ids_BT,
            attention_mask=mask_BT,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        ).logits
        return logits_B1V[:, -1].argmax(-1)

    @cached_property
    def _cache_argument(self) -> str:
        """What carries the cache: `cache` since transformers 5.23, `past_key_values` before."""
        known = inspect.signature(self.module.forward).parameters
        return "cache" if "cache" in known else "past_key_values"

    def _logprobs(self, ids_1T: Tensor, cache: Any) -> Tensor:
        """Log-probabilities of tokens 1..T−1, float32 [T−1]; the last token is not fed."""
        targets_T = ids_1T[0, 1:]
        pieces = []
        for start, end in self._chunks(len(targets_T), SCORE_CHUNK_TOKENS):
            chunk = slice(start, end)
            logits_1TV = self.module(ids_1T[:, chunk], use_cache=True, **{self._cache_argument: cache}).logits
            logits_TV = logits_1TV[0].float()
            chosen_T = logits_TV.gather(-1, targets_T[chunk, None])[:, 0]
            pieces.append(chosen_T - logits_TV.logsumexp(-1))
        return torch.cat(pieces)

    def _chunks(self, length: int, size: int) -> list[tuple[int, int]]:
        """[start, end) of each; one for all where the whole length decides how positions are rotated."""
        config = self.module.config  # transformers 5 and 4
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
            size = max(length, 1)
        return [(start, min(start + size, length)) for start in range(0, length, size)]

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.module.device)


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()

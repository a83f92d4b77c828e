"""The megatron backend: a training checkpoint evaluated in place on Megatron-Core, without conversion.

Prefill is chunked and prompts are decoded side by side without padding (each is a document of one pack).
Under torchrun the model is split over tensor-parallel ranks; every rank gets the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.evaluation.backend import Prompt, cut_at_stop, encode, load_tokenizer
from megatron_prolong.evaluation.hf import stop_tokens
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.mcore.inference import InferenceModel, load_for_inference
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import read_json
from megatron_prolong.runtime.launch import distributed


@dataclass(frozen=True)
class MegatronBackend:
    """A checkpoint of ours; greedy, float32 on CPU and bfloat16 on CUDA."""

    inference: InferenceModel
    tokenizer: Any
    model: str
    max_length: int
    stop_ids: frozenset[int]
    batch_size: int = 1
    name: str = "megatron"

    def token_logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """See `ScoringBackend`."""
        return self.inference.token_logprobs(ids).numpy()

    def continuation_logprobs(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """See `ScoringBackend`: the prompt's keys and values serve all continuations."""
        return self.inference.continuation_logprobs(prompt, continuations)

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Backend`."""
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        texts: list[str] = []
        for start in range(0, len(encoded), self.batch_size):
            batch = encoded[start : start + self.batch_size]
            for output in self.inference.generate(batch, max_new_tokens, sorted(self.stop_ids)):
                texts.append(cut_at_stop(self.tokenizer.decode(output, skip_special_tokens=True), stop))
        return texts


@contextmanager
def open_megatron(directory: Path, *, batch_size: int = 1, seed: int = 42) -> Iterator[MegatronBackend]:
    """Load a checkpoint directory; all ranks of the job hold one model together, split by tensor parallelism."""
    with distributed() as world:
        layout = Layout(tp=world.size, sequence_parallel=False)
        with megatron(layout, seed):
            precision = "fp32" if world.device.type == "cpu" else "bf16"
            inference = load_for_inference(directory, layout, world.device, precision)
            source = directory / "hf"
            generation = source / "generation_config.json"
            config = read_json(generation if generation.exists() else source / "config.json")
            yield MegatronBackend(
                inference=inference,
                tokenizer=load_tokenizer(source),
                model=str(directory),
                max_length=inference.model.shape.max_length,
                stop_ids=stop_tokens(config.get("eos_token_id")),
                batch_size=batch_size,
            )

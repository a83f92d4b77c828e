"""The megatron backend: a training checkpoint evaluated in place on Megatron-Core, without conversion.

Prefill is chunked and prompts are decoded side by side without padding (each is a document of one pack).
On several ranks the model is split by tensor parallelism as far as its key/value heads go and repeated beyond;
the replicas share out the prompts, and context-parallel ranks share each of them. The main rank evaluates, the
others follow it (`crew.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, batches, encode, refuse_nan, tokenizer_directory
from megatron_prolong.evaluation.crew import Crew, crew
from megatron_prolong.evaluation.ending import Ending, stop_tokens
from megatron_prolong.mcore.groups import megatron
from megatron_prolong.mcore.inference import Question, load_for_inference
from megatron_prolong.recipe.schema import Layout
from megatron_prolong.recipe.shape import ModelShape, read_json, read_shape
from megatron_prolong.runtime.agreement import together
from megatron_prolong.runtime.launch import World, distributed
from megatron_prolong.runtime.watchdog import Watchdog


@dataclass(frozen=True)
class MegatronBackend:
    """A checkpoint of ours; greedy, float32 on CPU and bfloat16 on CUDA."""

    inference: Crew
    model: str
    max_length: int
    batch_size: int = 1
    name: str = "megatron"

    @property
    def tokenizer(self) -> Any:
        """See `Backend`."""
        return self.inference.ending.tokenizer

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """See `ScoringBackend`."""
        return [
            logprobs.numpy()
            for some in batches(sequences, self.batch_size)
            for logprobs in self.inference.token_logprobs(some)
        ]

    def continuation_logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """See `ScoringBackend`: a prompt's keys and values serve all its continuations."""
        return [
            answer
            for some in batches(questions, self.batch_size)
            for answer in self.inference.continuation_logprobs(some)
        ]

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """See `Backend`."""
        encoded = [encode(self.tokenizer, prompt) for prompt in prompts]
        return [
            self.inference.ending.text(output, stop)
            for some in batches(encoded, self.batch_size)
            for output in self.inference.generate(some, max_new_tokens, stop)
        ]


@contextmanager
def open_megatron(
    directory: Path,
    *,
    batch_size: int = 1,
    cp: int = 1,
    world: World | None = None,
    watchdog: Watchdog | None = None,
) -> Iterator[MegatronBackend | None]:
    """Load a checkpoint directory on all ranks of the job; collective, and outside any `megatron(…)`.

    Args:
        batch_size: prompts decoded together by each replica of the model.
        cp: ranks that share each prompt: the work of reading it, and its keys and values.
        world: the job's ranks if torch.distributed is running already; else it is started and ended here.
        watchdog: fed with every forward pass, and with every call of the model.

    Yields:
        On the main rank the backend. On the others None, once the main rank is done with it.

    Raises:
        UserError: the ranks cannot be divided by cp, or the model's logits are NaN.
    """
    with ExitStack() as stack:
        world = world or stack.enter_context(distributed())
        shape = read_shape(directory)
        layout = together(lambda: inference_layout(shape, world.size, cp))
        groups = stack.enter_context(megatron(layout, seed=0))  # nothing draws from it
        precision = "fp32" if world.device.type == "cpu" else "bf16"
        inference = load_for_inference(directory, layout, groups, world.device, precision)
        if watchdog is not None:
            watchdog.feed_with(inference.model.chunks)
        members = stack.enter_context(crew(inference, _ending(directory), world, groups.dp, watchdog))
        if members is None:
            yield None
        else:
            backend = MegatronBackend(
                members, str(directory), shape.max_length, batch_size=batch_size * groups.dp.size
            )
            refuse_nan(backend)
            yield backend


def inference_layout(shape: ModelShape, world_size: int, cp: int = 1) -> Layout:
    """Tensor parallelism over as many of the ranks as divide key/value heads and MLP; what is left are replicas.

    Raises:
        UserError: the ranks cannot be divided by cp.
    """
    if world_size % cp:
        raise UserError(f"--cp {cp}: {world_size} ranks cannot be divided by it")
    tp = math.gcd(world_size // cp, shape.num_kv_heads, shape.ffn_hidden_size)
    return Layout(tp=tp, cp=cp, sequence_parallel=False)


def _ending(directory: Path) -> Ending:
    source = tokenizer_directory(directory)
    generation = source / "generation_config.json"
    config = read_json(generation if generation.exists() else source / "config.json")
    return Ending(source, stop_tokens(config.get("eos_token_id")))

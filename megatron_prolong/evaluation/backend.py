"""What an evaluation asks of a model: greedy text for prompts, and log-probabilities of tokens.

Three programs answer: Hugging Face transformers (`hf.py`), our own checkpoints in place on Megatron-Core
(`megatron.py`) and any OpenAI-compatible server (`openai.py`, text only).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.data.chat import ChatError, apply_template
from megatron_prolong.errors import UserError
from megatron_prolong.recipe.shape import (
    HF_DIR,
    MANIFEST,
    model_directory,
    no_model,
    read_json,
    read_shape,
    stages_hint,
)
from megatron_prolong.runtime.rendezvous import read_rendezvous

if TYPE_CHECKING:
    from megatron_prolong.mcore.inference import Question
    from megatron_prolong.runtime.launch import World

T = TypeVar("T")

_LESS_MEMORY = (
    "under torchrun a checkpoint of ours is spread over more GPUs, with --cp N each prompt too "
    "(docs/evaluation.md)"
)


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        text: the whole prompt, or with `chat` the user's message, which the model's chat template wraps.
        chat: apply the chat template and open the assistant's turn.
        ids: its tokens, where they are known already.
    """

    text: str
    chat: bool = False
    ids: list[int] | None = field(default=None, repr=False, compare=False)


class Backend(Protocol):
    """A model that continues prompts."""

    @property
    def name(self) -> str:
        """Which program: hf, megatron or openai."""
        ...

    @property
    def model(self) -> str:
        """Path or served name."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer: prompts are counted and cut with it."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens the model declares it can take (max_position_embeddings)."""
        ...

    @property
    def batch_size(self) -> int:
        """Prompts that are best handed over together."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterable[str | None]:
        """Greedy continuations, without the prompt, ended by the model's stop tokens or before a `stop` text.

        In order, each as soon as it is known, so that it can be kept should another one fail: a backend that asks
        for several at once gives None for what failed, and raises the error at the end.
        """
        ...


class ScoringBackend(Backend, Protocol):
    """A model that also says how likely tokens are. All of its continuations are texts."""

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterable[str]:
        """See `Backend`."""
        ...

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Of each sequence, the log-probability of each token given those before it: float32 [len − 1]."""
        ...

    def continuation_logprobs(self, questions: Sequence[Question]) -> list[list[float]]:
        """For each (prompt, continuations): the log-probability of each whole continuation after the prompt."""
        ...


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt's token ids, with the special tokens (or chat template) the model was trained with.

    Raises:
        UserError: there is no chat template, it refuses a user's message, or there is no token, which no model can
            continue.
    """
    ids = _encode(tokenizer, prompt) if prompt.ids is None else prompt.ids
    if not ids:
        raise UserError(
            f"the prompt {prompt.text[:80]!r} has no token, so there is nothing to continue; give a longer one, "
            f"or a tokenizer that begins with BOS ({tokenizer.name_or_path})"
        )
    return ids


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if not prompt.chat:
        return list(tokenizer(prompt.text)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; evaluate a base model with "
            "`--chat never`, or export the model with its template"
        )
    try:
        text = apply_template(tokenizer, [{"role": "user", "content": prompt.text}], open_turn=True)
    except ChatError as error:
        raise UserError(
            f"{tokenizer.name_or_path}: {error}; evaluate with `--chat never`, or mend the template"
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Neighbours together, the last batch perhaps smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def refuse_nan(backend: ScoringBackend) -> None:
    """Ask a model that was just opened for one log-probability: of NaN, greedy choice makes answers that score 0.

    Raises:
        UserError: it is not a number.
    """
    if np.isnan(backend.token_logprobs([[0, 0]])).any():
        raise UserError(
            f"{backend.model}: this model's logits are not numbers (NaN), so its scores would mean nothing; its "
            "weights are damaged, or its training had diverged: take an earlier checkpoint"
        )


def backend_kind(path: Path | str, *, kind: str = "auto", cp: int = 1) -> str:
    """`megatron` for a checkpoint of ours (or a run's stage), else `hf`.

    Args:
        kind: "hf" or "megatron" insists on one of them.
        cp: ranks that share each prompt (megatron).

    Raises:
        UserError: the directory is neither, or not of the kind asked for; hf on several ranks or with cp.
    """
    directory = model_directory(path)
    if not directory.exists():
        raise no_model(directory)
    if (directory / MANIFEST).exists() and kind != "hf":
        return "megatron"
    if not (directory / "config.json").exists() or kind == "megatron":
        raise UserError(
            f"{path}: not a Hugging Face model (config.json) for the hf backend, nor a checkpoint of ours "
            "(prolong.json) or a run's stage directory for the megatron backend; `prolong convert` makes either "
            f"from the other{stages_hint(directory)}"
        )
    if read_rendezvous(os.environ).size > 1 or cp > 1:
        raise UserError(
            f"{path}: the hf backend runs in one process; `prolong convert to-megatron` makes a checkpoint "
            "that is spread over all ranks"
        )
    return "hf"


@contextmanager
def open_backend(
    path: Path | str, *, batch_size: int = 1, kind: str = "auto", cp: int = 1, world: World | None = None
) -> Iterator[ScoringBackend | None]:
    """The backend for a directory, of its `backend_kind`.

    A checkpoint is spread over the ranks of torchrun or srun, when started by one (`megatron.open_megatron`): the
    main rank gets the backend, the others None once it is done.

    Args:
        world: as of `open_megatron`.

    Raises:
        UserError: see `backend_kind`; or the GPU's memory is full.
    """
    directory, kind = model_directory(path), backend_kind(path, kind=kind, cp=cp)
    from megatron_prolong.runtime.full_gpu import naming_a_full_gpu  # imports torch

    with naming_a_full_gpu(lambda: f"evaluating {path}", _LESS_MEMORY):
        if kind == "megatron":
            from megatron_prolong.evaluation.megatron import open_megatron

            with open_megatron(directory, batch_size=batch_size, cp=cp, world=world) as backend:
                yield backend
        else:
            from megatron_prolong.evaluation.hf import HuggingFaceBackend

            yield HuggingFaceBackend.open(directory, batch_size=batch_size)


def declared_length(directory: Path) -> int | None:
    """Tokens a model in a directory declares it can take; None where only opening it tells."""
    if (directory / MANIFEST).exists():
        return read_shape(directory).max_length
    config = directory / "config.json"
    length = read_json(config).get("max_position_embeddings") if config.exists() else None
    return length if isinstance(length, int) else None


def declares(model: str, length: int) -> str:
    """In the words of messages."""
    return f"{model} declares at most {length:,} tokens (max_position_embeddings)"


def tokenizer_directory(directory: Path) -> Path:
    """Where a model's tokenizer and generation config lie."""
    return directory / HF_DIR if (directory / MANIFEST).exists() else directory


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer stored in a model directory, read without the network."""
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        if not directory.exists():  # transformers says that it cannot reach the Hub
            raise no_model(directory) from error
        raise UserError(f"{directory}: no tokenizer that transformers can read: {error}") from error
    tokenizer.model_max_length = VERY_LARGE_INTEGER  # it would warn of longer texts; a model's length counts
    return tokenizer

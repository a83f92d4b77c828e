"""Where a generated answer ends: at one of the model's stop tokens, or before one of the task's stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_prolong.evaluation.backend import load_tokenizer


@dataclass(frozen=True)
class Ending:
    """What a model's answers end at.

    Attributes:
        directory: where the tokenizer lies; read when first needed, so never on ranks that meet no stop text.
        stop_ids: the stop tokens of the generation config.
    """

    directory: Path
    stop_ids: frozenset[int]

    @cached_property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return load_tokenizer(self.directory)

    def reached(self, output: Sequence[int], stop: Sequence[str] = ()) -> bool:
        """Whether the last of these tokens is a stop token or completes a stop text.

        A text lies in no more tokens than it has bytes. Where it is missed (tokenizers that drop a leading blank),
        the answer goes on, and `text` cuts it.
        """
        if self._stopped(output):
            return True
        if not stop:
            return False
        tail = self._decode(output[-max(len(text.encode()) for text in stop) :])
        return any(text in tail for text in stop)

    def text(self, output: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The answer's words."""
        return cut_at_stop(self._decode(output[:-1] if self._stopped(output) else output), stop)

    def _stopped(self, output: Sequence[int]) -> bool:
        return bool(output) and output[-1] in self.stop_ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.split(end, 1)[0] for end in stop), key=len, default=text)


def stop_tokens(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The stop tokens of a generation config, which writes one number or a list."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)

"""A model that needs no computing, and bounds that need no long documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_prolong.evaluation import alce
from megatron_prolong.evaluation.backend import Prompt
from megatron_prolong.evaluation.tasks import longqa, summ


@dataclass
class Parrot:
    """A backend that answers with the last words of the prompt, and counts; dies after `lives` prompts."""

    tokenizer: Any
    max_length: int = 1 << 20
    lives: int = 1 << 30
    name: str = "parrot"
    model: str = "parrot"
    batch_size: int = 2
    seen: list[str] = field(default_factory=list)
    stop: Sequence[str] = ()

    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        self.stop = stop
        for prompt in prompts:
            if len(self.seen) == self.lives:
                raise KeyboardInterrupt
            self.seen.append(prompt.text)
        return [" fact 1, 12 > 3 [1]. " + prompt.text[-20:] for prompt in prompts]


def short_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of 64K and more tokens would take the tests minutes."""
    monkeypatch.setattr(longqa, "NARRATIVE_MIN_TOKENS", 4000)
    monkeypatch.setattr(longqa, "INFBENCH_MIN_TOKENS", 4000)
    monkeypatch.setattr(summ, "CASE_MIN_TOKENS", 4000)
    # punkt is data that not every machine has; citations are split at ". " here
    monkeypatch.setattr(alce, "split_sentences", lambda text: text.split(". "))

"""The openai backend: any OpenAI-compatible server (vLLM, SGLang, TGI …), text only.

Base models get /completions with the whole prompt, chat models /chat/completions with one user message. The
model's tokenizer is needed here as well, because prompts are counted and cut before they are sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, encode
from megatron_prolong.evaluation.client import Client, in_short
from megatron_prolong.evaluation.ending import cut_at_stop

UNKNOWN_LENGTH = 1 << 62


@dataclass(frozen=True)
class OpenAIBackend:
    """A served model; greedy, seed 42 where the server knows seeds."""

    client: Client
    model: str
    tokenizer: Any
    max_length: int
    name: str = "openai"

    @classmethod
    def connect(cls, client: Client, model: str, tokenizer: Any) -> OpenAIBackend:
        """Ask the server whether it has the model, and how long its contexts may be.

        Raises:
            UserError: the server cannot be reached or does not serve the model.
        """
        listed = client.get("models")
        try:
            served = {
                entry["id"]: int(entry.get("max_model_len") or UNKNOWN_LENGTH) for entry in listed["data"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{client.base_url}/models: its answer lists no models and lengths: {in_short(listed)}"
            ) from error
        if model not in served:
            raise UserError(f"{client.base_url} does not serve {model}; it serves {', '.join(served)}")
        return cls(client, model, tokenizer, served[model])

    @property
    def batch_size(self) -> int:
        """As many as are under way at once, four times over, so that none waits for the slowest."""
        return 4 * self.client.concurrency

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[str | None]:
        """See `Backend`."""
        return self.client.map(lambda prompt: self._one(prompt, max_new_tokens, stop), prompts)

    def _one(self, prompt: Prompt, max_new_tokens: int, stop: Sequence[str]) -> str:
        # A prompt cut by HELMET's rule can be a few tokens too long to leave room for the whole answer.
        room = self.max_length - len(encode(self.tokenizer, prompt))
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max(1, min(max_new_tokens, room)),
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 42,
        }
        if stop:
            body["stop"] = list(stop)
        if prompt.chat:
            messages = [{"role": "user", "content": prompt.text}]
            text = self.client.complete("chat/completions", {**body, "messages": messages})
        else:
            text = self.client.complete("completions", {**body, "prompt": prompt.text})
        return cut_at_stop(text, stop)

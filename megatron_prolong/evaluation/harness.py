"""A checkpoint of ours as a model of lm-evaluation-harness, whose tasks then ask it like any other.

What its own `hf` model does (lm_eval/models/huggingface.py), without padding: the choices of a question share one
reading of its prompt, several questions are read side by side, and replicas of the model share them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_prolong.evaluation.backend import Prompt, ScoringBackend, batches
from megatron_prolong.runtime.progress import track

T = TypeVar("T")
_Request = tuple[object, list[int], list[int]]
"""What the harness asked in words, prompt, and continuation."""

ANSWER_TOKENS = 256  # where a task does not say; the harness's


class HarnessModel(TemplateLM):
    """Texts begin with BOS or not, whatever the tokenizer does; a prompt that is too long is cut on the left."""

    def __init__(self, backend: ScoringBackend, *, add_bos: bool) -> None:
        super().__init__()
        self.tokenizer = backend.tokenizer
        self._backend, self._add_bos = backend, add_bos

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose prompt is empty."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text."""
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer.encode(string, add_special_tokens=add))

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: object) -> list[tuple[float, bool]]:
        """Log-probability of each continuation. Whether it is the greedy one, no metric of ours asks: False."""
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (_words, context, continuation) in enumerate(requests):
            kept = context[-(self._backend.max_length + 1 - len(continuation)) :]
            asked.setdefault(tuple(kept), []).append(number)
        logprobs = [0.0] * len(requests)
        longest_first = sorted(asked, key=len, reverse=True)  # what does not fit in memory is met at once
        for some in self._batches(longest_first, "questions"):
            questions = [(prompt, [requests[number][2] for number in asked[prompt]]) for prompt in some]
            answers = self._backend.continuation_logprobs(questions)
            for prompt, answer in zip(some, answers, strict=True):
                for number, logprob in zip(asked[prompt], answer, strict=True):
                    logprobs[number] = logprob
        return [(logprob, False) for logprob in logprobs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._backend.max_length, context_len=1
            )
            found = self._loglikelihood_tokens([("", *make_disjoint_window(window)) for window in windows])
            totals.append(sum(logprob for logprob, _ in found))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the task's stop strings."""
        texts: list[str] = []
        for options, same in groupby((request.args for request in requests), key=itemgetter(1)):
            until, tokens = options.get("until", []), int(options.get("max_gen_toks", ANSWER_TOKENS))
            room = self._backend.max_length - tokens
            prompts = [Prompt(text, ids=self.tok_encode(text)[-room:]) for text, _ in same]
            stop = [until] if isinstance(until, str) else until
            for some in self._batches(prompts, "answers"):
                texts += self._backend.generate(some, tokens, stop)
        return texts

    def _batches(self, asked: Sequence[T], what: str) -> Iterator[Sequence[T]]:
        return track(batches(asked, self._backend.batch_size), len(asked), what, amount=len)

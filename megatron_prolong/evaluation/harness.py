"""A checkpoint of ours as a model of lm-evaluation-harness, whose tasks then ask it like any other.

What its own `hf` model does (lm_eval/models/huggingface.py), without padding: the choices of a question share one
reading of its prompt, several questions are read side by side, and replicas of the model share them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_prolong.data.chat import apply_template
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, ScoringBackend, batches, declares
from megatron_prolong.runtime.progress import track

T = TypeVar("T")
_Pair = tuple[list[int], list[int]]
"""Context and continuation."""
_Request = tuple[object, list[int], list[int]]
"""What the harness asked in words, and a pair."""

ANSWER_TOKENS = 256  # where a task does not say; the harness's
# What says it, first of these.
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """A prompt that is too long loses its beginning, as the harness has it.

    Attributes:
        cut_requests: how many have lost theirs (a question of four choices is four).
    """

    def __init__(self, backend: ScoringBackend, *, add_bos: bool | None, ask_greedy: bool) -> None:
        """What suites differ in.

        Args:
            add_bos: whether texts begin with BOS; None leaves it to the tokenizer, and to a text that has it.
            ask_greedy: whether to find out if a prompt's only continuation is the greedy one, which takes another
                reading of the prompt. Of several it is not asked; False stands for all that is not known.
        """
        super().__init__()
        self.tokenizer = backend.tokenizer
        self.cut_requests = 0
        self._backend, self._add_bos, self._ask_greedy = backend, add_bos, ask_greedy

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose prompt is empty."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """In the harness's records."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat, with the assistant's turn begun, or with its last message to be gone on with."""
        return apply_template(
            self.tokenizer,
            chat_history,
            open_turn=add_generation_prompt,
            open_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text."""
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        if add is None:
            bos = self.tokenizer.bos_token
            add = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one, where that is asked.

        A few contexts at a time: as tokens, all of a task would take more memory than the model.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        asked: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(request.args[0], []).append(number)
        longest_first = sorted(asked, key=len, reverse=True)  # what does not fit in memory is met at once
        for some in self._batches(longest_first, "questions"):
            numbers = [number for context in some for number in asked[context]]
            answers = super().loglikelihood([requests[number] for number in numbers], disable_tqdm=True)
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
        return found

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **_: object) -> list[tuple[float, bool]]:
        """The same of tokens."""
        pairs = [(context, continuation) for _words, context, continuation in requests]
        logprobs = self._logprobs(pairs)
        greedy: dict[int, bool] = {}
        if self._ask_greedy:
            times = Counter(tuple(context) for context, _ in pairs)
            alone = [number for number, (context, _) in enumerate(pairs) if times[tuple(context)] == 1]
            greedy = dict(zip(alone, self._are_greedy([pairs[number] for number in alone]), strict=True))
        return [(logprob, greedy.get(number, False)) for number, logprob in enumerate(logprobs)]

    def _logprobs(self, pairs: Sequence[_Pair]) -> list[float]:
        """Of whole continuations; each context is read once."""
        asked: dict[tuple[int, ...], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            kept = self._cut(context, self._backend.max_length + 1 - len(continuation))
            asked.setdefault(tuple(kept), []).append(number)
        questions = [(prompt, [pairs[number][1] for number in numbers]) for prompt, numbers in asked.items()]
        logprobs = [0.0] * len(pairs)
        for numbers, answers in zip(
            asked.values(), self._backend.continuation_logprobs(questions), strict=True
        ):
            for number, logprob in zip(numbers, answers, strict=True):
                logprobs[number] = logprob
        return logprobs

    def _are_greedy(self, pairs: Sequence[_Pair]) -> list[bool]:
        """Whether the model's own answer to each context is the continuation."""
        found = [False] * len(pairs)
        lengths = [len(continuation) for _, continuation in pairs]
        for tokens, same in groupby(sorted(range(len(pairs)), key=lengths.__getitem__), lengths.__getitem__):
            room = self._backend.max_length + 1 - tokens
            numbers = list(same)
            answers = self._backend.generate([Prompt("", ids=pairs[n][0][-room:]) for n in numbers], tokens)
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer == self.tokenizer.decode(pairs[number][1])
        return found

    def _cut(self, context: list[int], room: int) -> list[int]:
        if room < 1:
            declared = declares(self._backend.model, self._backend.max_length)
            raise UserError(
                f"a task's answers may be so long that there is no room for its prompts: {declared}"
            )
        self.cut_requests += len(context) > room
        return context[-room:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        totals = []
        for (text,) in track((request.args for request in requests), len(requests), "texts"):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._backend.max_length, context_len=1
            )
            totals.append(sum(self._logprobs([make_disjoint_window(window) for window in windows])))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to the task's stop strings."""
        texts: list[str] = []
        for options, same in groupby((request.args for request in requests), key=itemgetter(1)):
            until = options.get("until") or []
            tokens = int(next((options[name] for name in _MOST_TOKENS if name in options), ANSWER_TOKENS))
            room = self._backend.max_length - tokens
            if options.get("do_sample") or options.get("num_beams", 1) != 1:
                raise UserError(f"a task draws its answers ({options}), but here they are greedy")
            stop = [until] if isinstance(until, str) else until
            for some in self._batches([text for text, _ in same], "answers"):
                prompts = [Prompt(text, ids=self._cut(self.tok_encode(text), room)) for text in some]
                texts += self._backend.generate(prompts, tokens, stop)
        return texts

    def _batches(self, asked: Sequence[T], what: str) -> Iterator[Sequence[T]]:
        return track(batches(asked, self._backend.batch_size), len(asked), what, amount=len)

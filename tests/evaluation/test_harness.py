"""What a model of lm-evaluation-harness is asked, told by one that keeps what it is asked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt
from megatron_prolong.evaluation.harness import HarnessModel

BOS, EOS = 0, 1


class Kept:
    """A model of 8 tokens. Every continuation's log-probability is the negative of its prompt's length, and every
    answer is the prompt's end."""

    model, max_length, batch_size = "kept", 8, 2

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.questions: list[tuple[str, list[str]]] = []
        self.prompts: list[tuple[str, int, list[str]]] = []
        self.batches: list[int] = []

    def continuation_logprobs(
        self, questions: Sequence[tuple[Sequence[int], Sequence[list[int]]]]
    ) -> list[list[float]]:
        for prompt, continuations in questions:
            self.questions.append(
                (self.tokenizer.decode(prompt), [*map(self.tokenizer.decode, continuations)])
            )
        return [[-float(len(prompt))] * len(continuations) for prompt, continuations in questions]

    def generate(self, prompts: Sequence[Prompt], tokens: int, stop: Sequence[str] = ()) -> list[str]:
        texts = [self.tokenizer.decode(prompt.ids) for prompt in prompts]
        self.batches.append(len(prompts))
        self.prompts += [(text, tokens, list(stop)) for text in texts]
        return [text[-tokens:] for text in texts]


@pytest.fixture
def kept(byte_tokenizer: Any) -> Kept:
    """A byte is a token; texts begin with BOS."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    inner = tokenizer.backend_tokenizer
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return Kept(tokenizer)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_contexts_lose_their_beginning_where_context_and_continuation_do_not_fit(kept: Kept) -> None:
    """The last token of a continuation is not read: together they may be one more than the length."""
    model = HarnessModel(kept, add_bos=False, ask_greedy=True)  # type: ignore[arg-type]
    found = model.loglikelihood(asked(("abcdef", "xyz"), ("abcdefg", "efg"), ("a", "12345678")))
    longest_first = [("bcdefg", ["efg"]), ("abcdef", ["xyz"]), ("a", ["12345678"])]
    assert kept.questions == longest_first, "so that what does not fit in memory is met at once"
    assert model.cut_requests == 1
    assert found == [(-6, False), (-6, True), (-1, False)], "in the order they were asked in"
    assert ("bcdefg", 3, []) in kept.prompts
    with pytest.raises(UserError, match="no room for its prompts: kept declares at most 8 tokens"):
        model.loglikelihood(asked(("a", "123456789")))


def test_only_a_single_continuation_may_be_the_greedy_one(kept: Kept) -> None:
    model = HarnessModel(kept, add_bos=False, ask_greedy=True)  # type: ignore[arg-type]
    assert model.loglikelihood(asked(("ab", "b"), ("cd", "d"), ("ab", "x"))) == [
        (-2, False),
        (-2, True),
        (-2, False),
    ]
    assert [text for text, _, _ in kept.prompts] == ["cd"]
    assert ("ab", ["b", "x"]) in kept.questions, "read once"


@pytest.mark.parametrize("add", [None, False, True])
def test_bos_stands_once_where_it_is_wanted(add: bool | None, kept: Kept) -> None:
    model = HarnessModel(kept, add_bos=add, ask_greedy=False)  # type: ignore[arg-type]
    plain = kept.tokenizer.encode("ab", add_special_tokens=False)
    assert model.tok_encode("ab") == ([] if add is False else [BOS]) + plain
    assert model.tok_encode("<bos>ab") == ([BOS] if add else []) + [BOS, *plain]
    assert model.tok_encode("ab", add_special_tokens=False) == plain
    kept.tokenizer.bos_token = None  # what begins its texts then has another name
    assert model.tok_encode("ab") == ([] if add is False else [BOS]) + plain


def test_a_chat_ends_with_a_turn_or_a_message_to_go_on_with(kept: Kept) -> None:
    kept.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    model = HarnessModel(kept, add_bos=None, ask_greedy=False)  # type: ignore[arg-type]
    asked_for, begun = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The"}
    assert model.apply_chat_template([asked_for]) == "u:Who?;a:"
    assert model.apply_chat_template([asked_for, begun], add_generation_prompt=False) == "u:Who?;a:The"


def test_without_a_prompt_bos_is_one_or_else_eos(kept: Kept) -> None:
    for prefix in ("<bos>", "<eos>"):
        model = HarnessModel(kept, add_bos=False, ask_greedy=False)  # type: ignore[arg-type]
        assert model.loglikelihood(asked(("", "x"))) == [(-1, False)]
        assert kept.questions.pop() == (prefix, ["x"])
        kept.tokenizer.bos_token = None
    assert not kept.prompts, "what is greedy was not asked"


def test_a_text_is_read_in_windows_of_the_models_length(kept: Kept) -> None:
    model = HarnessModel(kept, add_bos=False, ask_greedy=False)  # type: ignore[arg-type]
    (total,) = model.loglikelihood_rolling(asked(("abcdefghijklmnopqr",)))
    assert kept.questions == [("<bos>", ["abcdefgh"]), ("h", ["ijklmnop"]), ("jklmnop", ["qr"])]
    assert total == -1 - 1 - 7 and model.cut_requests == 0


def test_answers_are_asked_for_as_the_task_says(kept: Kept) -> None:
    kept.max_length = 300
    model = HarnessModel(kept, add_bos=False, ask_greedy=False)  # type: ignore[arg-type]
    ways: list[dict[str, Any]] = [
        {"until": "xy", "max_new_tokens": 2, "max_tokens": 3},
        {"until": ["x", "y"], "max_completion_tokens": 4, "num_beams": 1},
        {"max_gen_toks": 5, "max_new_tokens": 2, "do_sample": False},
        {"until": None},
    ]
    texts = ["a" * 297, "b" * 298 + "c", "d" * 299]
    answers = model.generate_until(asked(*((text, way) for way in ways for text in texts)))
    assert [len(answer) for answer in answers] == [2] * 3 + [4] * 3 + [5] * 3 + [44] * 3
    assert [answer[-1] for answer in answers] == ["a", "c", "d"] * 4
    assert [(len(text), tokens, stop) for text, tokens, stop in kept.prompts] == [
        (297, 2, ["xy"]), (298, 2, ["xy"]), (298, 2, ["xy"]), *[(296, 4, ["x", "y"])] * 3,
        *[(295, 5, [])] * 3, *[(44, 256, [])] * 3,
    ]  # fmt: skip
    assert model.cut_requests == 11 and kept.batches == [2, 1] * 4
    for drawn in ({"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(UserError, match="draws its answers"):
            model.generate_until(asked(("a", drawn)))

"""What is counted and cut of prompts, with a byte to a token."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.prompts import chat_tokens, cut_end
from megatron_prolong.evaluation.suite import refuse_chat
from megatron_prolong.evaluation.suites import select


@pytest.mark.parametrize("fast", [True, False])
def test_as_many_tokens_are_cut_as_are_too_many(fast: bool, byte_tokenizer: Any) -> None:
    class Slow(SimpleNamespace):
        def __call__(self, text: str) -> Any:
            return byte_tokenizer(text)

    tokenizer = byte_tokenizer if fast else Slow(is_fast=False, decode=byte_tokenizer.decode)
    assert [cut_end(tokenizer, "abcd", count) for count in (1, 3, 4, 5)] == ["abc", "a", "", None]


def test_room_is_left_for_what_a_chat_template_adds(byte_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    assert chat_tokens(tokenizer) == len("<|user|><|assistant|>")
    for template in ("{{ raise_exception('no lone message') }}", None):
        tokenizer.chat_template = template
        assert chat_tokens(tokenizer) == 0


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ raise_exception('no lone message') }}", "no lone message"), ("{% for", "unexpected 'end of")],
)
def test_a_template_that_takes_no_question_is_met_before_any_is_asked(
    template: str, said: str, byte_tokenizer: Any
) -> None:
    """HELMET asks its first four categories without one, for hours."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = template
    tasks = select("helmet", [8192])
    for chat, refused in (("auto", tasks), ("always", tasks[:1])):
        with pytest.raises(UserError, match=f"chat template refuses it: .*{said}.*--chat never"):
            refuse_chat(refused, tokenizer, chat)
    refuse_chat(tasks, tokenizer, "never")
    refuse_chat(tasks[:1], tokenizer, "auto")

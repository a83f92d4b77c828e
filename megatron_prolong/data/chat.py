"""Chats to tokens and loss masks, through the tokenizer's own chat template.

Llama-3's templates do not mark what the assistant wrote (they have no `{% generation %}`), so the spans
are found by rendering prefixes: the text of the first i messages with the assistant's header opened, and
the text of the first i+1. What the second adds to the first is what the model must learn to write: the
assistant's content and the token that ends its turn. Everything else has mask 0: the beginning of text,
system and user messages, and every header, the assistant's own included (ProLong's rule).

The whole chat is tokenized once; characters become tokens through the tokenizer's offsets, so the tokens
are those of `apply_chat_template`, and nothing is added to them: the template writes the beginning of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from megatron_prolong.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, str]
Rendered = tuple[str, list[tuple[int, int]]]
"""Text of a chat, and the [start, end) characters of what the assistant wrote."""
_ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BATCH_CHARACTERS = 1 << 20  # encoded together; the tokenizer's result holds some hundred bytes a token

# Llama-3.1 and later write today's date into the system prompt; 26 Jul 2024 is their own default, and a
# fixed one makes the same chats the same tokens on every day.
_TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True, eq=False)
class EncodedChat:
    """One chat as the model reads it.

    tokens: uint32 [n]. mask: uint8 [n], 1 on what the assistant wrote and on the end of its turn.
    turn_ends: int64 [assistant turns], number of tokens up to and including each end of turn.
    """

    tokens: NDArray[np.uint32]
    mask: NDArray[np.uint8]
    turn_ends: NDArray[np.int64]

    def cut(self, max_tokens: int) -> EncodedChat | None:
        """The chat up to the last assistant turn that ends within max_tokens; None if not even one does.

        Half an answer is never kept: it would teach the model to stop without an end of turn, or never to.
        """
        if len(self.tokens) <= max_tokens:
            return self
        fitting = self.turn_ends[self.turn_ends <= max_tokens]
        if not len(fitting):
            return None
        return EncodedChat(self.tokens[: fitting[-1]], self.mask[: fitting[-1]], fitting)


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches the tokens that only a template may write, such as <|eot_id|>: special ones, and others it names.

    The rest of the added tokens are words: <think>, where the tokenizer has one and the template leaves it alone.
    """
    added, template = tokenizer.added_tokens_decoder.values(), str(tokenizer.chat_template)
    written = {token.content for token in added if token.special or token.content in template}
    names = sorted({*tokenizer.all_special_tokens, *written}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def find_problem(messages: Any, control: re.Pattern[str]) -> str | None:
    """Why this is not a chat to train on, or None.

    A chat is a list of messages with a role and a text as content: at most one of the system, first; then
    those of user and assistant, a user's first, an assistant's among them. A control token in a text would be
    read as the beginning or end of a turn.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return f"messages must be a non-empty list, found {messages!r:.80}"
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"message {number} needs a role and a text as content, found {message!r:.80}"
        role = message.get("role")
        if role not in _ROLES:
            return f"message {number} has the role {role!r}, which is none of {', '.join(_ROLES)}"
        if role == "system" and number:
            return f"message {number} is the system's, which must come first"
        if _SURROGATE.search(message["content"]):
            return f"message {number} holds half a surrogate pair, which is no character"
        if found := control.search(message["content"]):
            return f"message {number} holds the control token {found[0]} as text; remove it"
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if turns[:1] == ["assistant"]:
        return "the chat begins with the assistant; a user must speak first"
    return None if "assistant" in turns else "no message of this chat is the assistant's"


class ChatError(UserError):
    """A chat that the tokenizer's template does not take. reason: for a count."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def apply_template(
    tokenizer: Any, messages: Sequence[Message], *, open_turn: bool = False, open_message: bool = False
) -> str:
    """The chat template's text of the messages, the same on every day.

    open_turn: the assistant's next turn is begun. open_message: the last message is not ended, for the model to go
    on with. Raises ChatError when the template refuses them, or is none itself.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=open_turn,
                continue_final_message=open_message,
                **_TEMPLATE_VARIABLES,
            )
        )
    except TemplateError as error:
        raise ChatError(
            "refused by the chat template", f"the tokenizer's chat template refuses it: {error}"
        ) from error


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """The template's text of a chat and the [start, end) characters of every assistant turn in it.

    Raises ChatError when the template rewrites earlier turns or refuses the chat, UserError when there is none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path or ''} has no chat template; "
            "take the tokenizer of the Instruct model"
        )

    def text_of(count: int, open_turn: bool = False) -> str:
        return apply_template(tokenizer, messages[:count], open_turn=open_turn)

    text = text_of(len(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(number, open_turn=True), text_of(number + 1)
        if not (after.startswith(before) and text.startswith(after)):
            raise ChatError(
                "rewritten by the chat template",
                f"message {number}: the chat template does not keep earlier turns as they were, "
                "so what the assistant wrote cannot be told apart; use a template in the manner of Llama-3's "
                "current one (tokenizer_config.json, key chat_template)",
            )
        spans.append((len(before), len(after)))
    return text, spans


def encode_batch(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerFast) -> list[EncodedChat]:
    """Tokens and masks of many chats, tokenized together by the Rust tokenizer."""
    encoded: list[EncodedChat] = []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a fine-tune may have left lengths in tokenizer.json
    backend.no_padding()
    for batch in _batches(rendered):
        encodings = backend.encode_batch([text for text, _ in batch], add_special_tokens=False)
        encoded += [_mask(encoding, spans) for encoding, (_, spans) in zip(encodings, batch, strict=True)]
    return encoded


def _batches(rendered: Sequence[Rendered]) -> Iterator[Sequence[Rendered]]:
    """Consecutive chats of about _BATCH_CHARACTERS together."""
    start, room = 0, _BATCH_CHARACTERS
    for end, (text, _) in enumerate(rendered, start=1):
        room -= len(text)
        if room <= 0 or end == len(rendered):
            yield rendered[start:end]
            start, room = end, _BATCH_CHARACTERS


def _mask(encoding: Any, spans: Sequence[tuple[int, int]]) -> EncodedChat:
    """Mark the tokens whose characters lie in a span.

    Offsets of blanks may be trimmed to nothing (post-processors with trim_offsets), so a span takes every
    token from the first that ends inside it to the last that begins inside it. A token that begins before
    the span holds a piece of the header, and stays out.
    """
    # fromiter is several times faster than array on a list of pairs.
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding)).reshape(-1, 2)
    mask = np.zeros(len(offsets), np.uint8)
    ends = []
    for start, end in spans:
        first = int(np.searchsorted(offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(offsets[:, 0], end, side="left"))
        if first < last and offsets[first, 0] < start:
            first += 1
        mask[first:last] = 1
        ends.append(last)
    return EncodedChat(np.array(encoding.ids, np.uint32), mask, np.array(ends, np.int64))


def refuse_empty_masks(num_tokens: int, num_targets: int, where: str) -> None:
    """Raises UserError when the masks of a data set say nothing: all zeros, or all ones."""
    if num_tokens and num_targets == 0:
        raise UserError(
            f"{where}: no token of any chat is marked as the assistant's, so there is nothing to learn; "
            "look at the messages' roles (prolong data inspect shows the masks)"
        )
    if num_tokens and num_targets == num_tokens:
        raise UserError(
            f"{where}: every token is marked as the assistant's, headers and users' messages too; "
            "look at the chat template (prolong data inspect shows the masks)"
        )

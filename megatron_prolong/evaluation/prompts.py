"""From a row to the prompt: templates, and HELMET's rule for what does not fit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import Prompt, encode
from megatron_prolong.evaluation.task import Row, Task


@dataclass(frozen=True)
class Prepared:
    """A prompt ready for the model. removed_tokens: how much of the context's end was cut off."""

    prompt: Prompt
    ids: list[int]
    removed_tokens: int


def render(task: Task, row: Row, chat: bool) -> Prompt:
    """With a chat template the model gets the question only; without one, the answer's first words as well."""
    template = task.template if chat else task.template + task.separator + task.answer_prefix
    return Prompt(template.format(**row), chat)


def chat_tokens(tokenizer: Any) -> int:
    """What the chat template adds to a message. Generated tasks leave room for it, whether it is used or not."""
    if not getattr(tokenizer, "chat_template", None):
        return 0
    with suppress(UserError):  # one that refuses a lone message; it is said when a chat is asked for
        return len(encode(tokenizer, Prompt("x", chat=True))) - len(encode(tokenizer, Prompt("x")))
    return 0


def prepare(task: Task, row: Row, chat: bool, tokenizer: Any, max_length: int) -> Prepared:
    """The prompt, cut so that it and the answer fit into `max_length` tokens.

    HELMET's rule: as many tokens as the whole prompt is too long are dropped from the end of the context;
    instructions, demonstrations and question stay whole. Counting the shorter prompt can come out a few tokens
    above the limit, as in HELMET.

    Raises:
        UserError: the prompt is too long even without any context.
    """
    prompt = render(task, row, chat)
    ids = encode(tokenizer, prompt)
    excess = len(ids) - (max_length - task.max_new_tokens)
    if excess <= 0:
        return Prepared(replace(prompt, ids=ids), ids, 0)
    shorter = cut_end(tokenizer, row["context"], excess)
    if shorter is None:
        raise UserError(
            f"{task.name}: instructions, demonstrations and question alone take more than the {max_length} "
            "tokens of the length; leave this task out at this length (--tasks), or ask for a longer one"
        )
    prompt = render(task, {**row, "context": shorter}, chat)
    ids = encode(tokenizer, prompt)
    return Prepared(replace(prompt, ids=ids), ids, excess)


def cut_end(tokenizer: Any, text: str, num_tokens: int) -> str | None:
    """The text before its `num_tokens`-th token from the end; None when it has fewer."""
    if not tokenizer.is_fast:
        ids = tokenizer(text)["input_ids"]
        return None if num_tokens > len(ids) else str(tokenizer.decode(ids[:-num_tokens]))
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return None if num_tokens > len(offsets) else text[: offsets[-num_tokens][0]]

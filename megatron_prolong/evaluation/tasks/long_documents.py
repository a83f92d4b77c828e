"""One long document per prompt: Llama-2's tokenizer cuts it, so that every model sees the same text.

HELMET measures and cuts with meta-llama/Llama-2-7b-hf (gated). It is looked for in the data directory as
`llama2_tokenizer/`; without it the model's own tokenizer does the cutting, which the results then say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_prolong.evaluation.backend import load_tokenizer
from megatron_prolong.evaluation.prompts import cut_end
from megatron_prolong.evaluation.task import Inputs

LLAMA2 = "llama2_tokenizer"
OMITTED = " ... [the rest of the text is omitted]"


def document_tokenizer(inputs: Inputs) -> Any:
    """Llama-2's tokenizer from the data directory, else the model's own."""
    return load_tokenizer(inputs.data / LLAMA2) if inputs.data and has_llama2(inputs) else inputs.tokenizer


def has_llama2(inputs: Inputs) -> bool:
    """Whether documents are cut as HELMET cuts them."""
    return inputs.data is not None and (inputs.data / LLAMA2).exists()


def document_cutter(inputs: Inputs, least: int, budget: int) -> Callable[[str], str | None]:
    """A function that gives what is shown of a document (see `cut_document`); None for one below `least` tokens.

    Many questions are asked about one document, and to tokenize it takes a second: it is done once.
    """
    tokenizer = document_tokenizer(inputs)

    @cache
    def shown(text: str) -> str | None:
        return cut_document(tokenizer, text, least, budget)

    return shown


def cut_document(tokenizer: Any, text: str, least: int, budget: int) -> str | None:
    """The document's beginning and a note, in about `budget` tokens (HELMET's truncate_llama2).

    None for a document below `least` tokens, special ones counted.
    """
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    total = len(encoded["input_ids"])
    if total < least:
        return None
    if total <= budget:
        return text
    last = budget - len(tokenizer(OMITTED)["input_ids"])
    if not tokenizer.is_fast:
        return f"{cut_end(tokenizer, text, total - last - 1)}{OMITTED}"
    return text[: encoded["offset_mapping"][last][1]] + OMITTED

"""One long document per prompt: Llama-2's tokenizer cuts it, so that every model sees the same text.

HELMET measures and cuts with meta-llama/Llama-2-7b-hf (gated). It is looked for in the data directory as
`llama2_tokenizer/`; without it the model's own tokenizer does the cutting, which the results then say.
"""

from __future__ import annotations

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


def num_tokens(tokenizer: Any, text: str) -> int:
    """Tokens with the special ones."""
    return len(tokenizer(text)["input_ids"])


def cut_document(tokenizer: Any, text: str, budget: int) -> str:
    """The document's beginning and a note, in about `budget` tokens (HELMET's truncate_llama2)."""
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast)
    total = len(encoded["input_ids"])
    if total <= budget:
        return text
    last = budget - num_tokens(tokenizer, OMITTED)
    if not tokenizer.is_fast:
        return f"{cut_end(tokenizer, text, total - last - 1)}{OMITTED}"
    return text[: encoded["offset_mapping"][last][1]] + OMITTED

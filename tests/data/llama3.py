"""A tokenizer in the manner of Llama-3's, small enough to train inside a test."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_prolong.data.chat import EncodedChat, encode_batch, render

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXT = [
    "system user assistant\n\nYou are a helpful assistant.",
    "What is the capital of France? The capital of France is Paris.",
    "def main():\n    return 42\n\n\nprint(main())",
]


@cache
def llama3_tokenizer(
    *, words: str = WORDS, trim_offsets: bool = False, template: str = TEMPLATE, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama-3's word pattern, special tokens, chat template and leading begin-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(
                single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token="<|eot_id|>", chat_template=template
    )


def encode_chats(
    chats: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast
) -> list[EncodedChat]:
    return encode_batch([render(messages, tokenizer) for messages in chats], tokenizer)


def encode(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of one chat."""
    (chat,) = encode_chats([messages], tokenizer)
    return chat.tokens, chat.mask

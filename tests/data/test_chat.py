import copy
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama3 import TEMPLATE, encode, encode_chats, llama3_tokenizer
from tokenizers import AddedToken

from megatron_prolong.data.batch import NO_LABEL, PackedBatch, collate_pieces
from megatron_prolong.data.chat import (
    ChatError,
    EncodedChat,
    control_tokens,
    find_problem,
    refuse_empty_masks,
)
from megatron_prolong.data.packed import Identity, PackedSequence
from megatron_prolong.errors import UserError

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is the capital of France? "},
    {"role": "assistant", "content": " Paris.\n\n  Naïve café 🙂."},
    {"role": "user", "content": "And of Spain?"},
    {"role": "assistant", "content": "Madrid."},
]


def spans(tokens: np.ndarray, mask: np.ndarray, tokenizer=None) -> list[tuple[int, str]]:
    """The text in runs of equal mask."""
    tokenizer = tokenizer or llama3_tokenizer()
    return [
        (int(bit), tokenizer.decode([token for token, _ in run]))
        for bit, run in groupby(zip(tokens.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1])
    ]


def test_the_masked_text_of_a_chat_of_two_turns_with_a_system_prompt() -> None:
    tokens, mask = encode(CHAT, llama3_tokenizer())
    assert tokens.dtype == np.uint32 and mask.dtype == np.uint8
    assert spans(tokens, mask) == [
        (
            0,
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are terse.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (1, "Paris.\n\n  Naïve café 🙂.<|eot_id|>"),
        (
            0,
            "<|start_header_id|>user<|end_header_id|>\n\nAnd of Spain?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (1, "Madrid.<|eot_id|>"),
    ]


def test_the_tokens_are_those_of_the_template_with_one_beginning_of_text() -> None:
    tokenizer = llama3_tokenizer()
    tokens, _ = encode(CHAT, tokenizer)
    assert tokens.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokens.tolist().count(tokenizer.bos_token_id) == 1


def mask_by_token_diff(messages: list[dict[str, str]]) -> list[int]:
    """The dull twin: tokenize the text before and after every assistant turn, and compare token by token."""
    tokenizer = llama3_tokenizer()
    mask: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                messages[:number], return_dict=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: number + 1], return_dict=False)
            assert after[: len(before)] == before
            mask += [0] * (len(before) - len(mask)) + [1] * (len(after) - len(before))
    return mask + [0] * (len(tokenizer.apply_chat_template(messages, return_dict=False)) - len(mask))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
chats = st.builds(
    lambda system, turns, open_end: (
        [{"role": "system", "content": text} for text in system]
        + [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        + [{"role": "user", "content": text} for text in open_end]
    ),
    st.lists(texts, max_size=1),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.lists(texts, max_size=1),
)


@given(chats)
def test_masks_equal_the_difference_of_token_prefixes(messages: list[dict[str, str]]) -> None:
    _, mask = encode(messages, llama3_tokenizer())
    assert mask.tolist() == mask_by_token_diff(messages)


@given(chats)
def test_blanks_with_trimmed_offsets_are_masked_all_the_same(messages: list[dict[str, str]]) -> None:
    plain = encode(messages, llama3_tokenizer())
    trimmed = encode(messages, llama3_tokenizer(trim_offsets=True))
    assert np.array_equal(plain[0], trimmed[0]) and np.array_equal(plain[1], trimmed[1])


def test_headers_stay_out_where_the_pattern_would_join_them_with_the_answer() -> None:
    """GPT-2's word pattern tokenizes the header's blank line differently with and without what follows."""
    tokenizer = llama3_tokenizer(words=GPT2_WORDS)
    tokens, mask = encode(CHAT, tokenizer)
    assert [text for bit, text in spans(tokens, mask, tokenizer) if bit] == [
        "Paris.\n\n  Naïve café 🙂.<|eot_id|>",
        "Madrid.<|eot_id|>",
    ]


def test_a_token_that_straddles_header_and_answer_stays_out() -> None:
    tokenizer = llama3_tokenizer(words=r"[\s\S]+")  # one word between control tokens
    tokens, mask = encode([CHAT[1], {"role": "assistant", "content": "You are."}], tokenizer)
    (_, header), (_, answer) = spans(tokens, mask, tokenizer)
    assert header.endswith("assistant<|end_header_id|>\n\nYo") and answer == "u are.<|eot_id|>"


def test_a_header_that_ends_in_a_trimmed_blank_stays_out() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for trim_offsets in (False, True):
        tokenizer = llama3_tokenizer(
            words=r"\p{L}+|\s|[^\s\p{L}]+", template=template, trim_offsets=trim_offsets
        )
        tokens, mask = encode(CHAT[1:], tokenizer)
        assert [text for bit, text in spans(tokens, mask, tokenizer) if bit] == [
            "Paris.\n\n  Naïve café 🙂.<|eot_id|>",
            "Madrid.<|eot_id|>",
        ]


def test_the_date_of_the_day_does_not_change_the_tokens() -> None:
    dated = TEMPLATE.replace(
        "{% for message in messages %}",
        "{% if not date_string is defined %}{% set date_string = strftime_now('%H %M %S') %}{% endif %}"
        "{{ 'Today Date: ' + date_string }}{% for message in messages %}",
    )
    tokenizer = llama3_tokenizer(template=dated)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(encode(CHAT, tokenizer)[0])


def test_a_chat_too_long_is_cut_after_the_last_whole_answer() -> None:
    chat = encode_chats([CHAT], llama3_tokenizer())[0]
    first, second = chat.turn_ends.tolist()
    assert second == len(chat.tokens)
    assert chat.cut(second) is chat
    for limit in (first, first + 1, second - 1):
        cut = chat.cut(limit)
        assert cut is not None
        assert cut.tokens.tolist() == chat.tokens[:first].tolist() and len(cut.mask) == first
        assert llama3_tokenizer().decode(cut.tokens).endswith("🙂.<|eot_id|>")
        assert cut.mask[-1] == 1 and cut.turn_ends.tolist() == [first]
    assert chat.cut(first - 1) is None


def test_of_several_answers_that_fit_the_last_ends_the_chat() -> None:
    chat = encode_chats([[*CHAT, *CHAT[3:]]], llama3_tokenizer())[0]
    first, second, _ = chat.turn_ends.tolist()
    cut = chat.cut(second)
    assert cut is not None and cut.turn_ends.tolist() == [first, second]
    assert cut.tokens.tolist() == chat.tokens[:second].tolist()
    assert cut.mask.tolist() == chat.mask[:second].tolist()


def test_lengths_that_a_fine_tune_left_in_the_tokenizer_neither_cut_nor_fill() -> None:
    tokenizer = llama3_tokenizer()
    expected, _ = encode(CHAT, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(16)
    assert encode(CHAT, tokenizer)[0].tolist() == expected.tolist()
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert encode(CHAT, tokenizer)[0].tolist() == expected.tolist()


def test_batches_equal_single_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_prolong.data.chat._BATCH_CHARACTERS", 500)
    other = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for chat, messages in zip(
        encode_chats([CHAT, other, other, CHAT], llama3_tokenizer()), [CHAT, other, other, CHAT], strict=True
    ):
        tokens, mask = encode(messages, llama3_tokenizer())
        assert np.array_equal(chat.tokens, tokens) and np.array_equal(chat.mask, mask)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages must be a non-empty list, found []"),
        ("hello", "messages must be a non-empty list, found 'hello'"),
        ([{"role": "user"}], "message 0 needs a role and a text as content"),
        ([{"role": "user", "content": ["part"]}], "message 0 needs a role and a text"),
        ([{"role": "human", "content": "x"}], "message 0 has the role 'human', which is none of system,"),
        ([CHAT[1], CHAT[0]], "message 1 is the system's, which must come first"),
        ([CHAT[2]], "the chat begins with the assistant"),
        ([CHAT[0], CHAT[2], CHAT[1], CHAT[2]], "the chat begins with the assistant"),
        ([CHAT[0], CHAT[1]], "no message of this chat is the assistant's"),
        ([{"role": "user", "content": "x\ud83d"}, CHAT[2]], "message 0 holds half a surrogate pair"),
        (
            [CHAT[1], {"role": "assistant", "content": "x<|eot_id|>y"}],
            "message 1 holds the control token <|eot_id|> as text",
        ),
    ],
)
def test_what_is_no_chat_is_refused(messages: list, said: str) -> None:
    tokenizer = llama3_tokenizer()
    problem = find_problem(messages, control_tokens(tokenizer))
    assert problem is not None and problem.startswith(said)


def test_what_is_a_chat_has_no_problem() -> None:
    control = control_tokens(llama3_tokenizer())
    for messages in (CHAT, CHAT[:4], CHAT[1:3], [{"name": "extra", **message} for message in CHAT]):
        assert find_problem(messages, control) is None


def test_an_added_word_is_text_unless_the_template_writes_it() -> None:
    thinking = [CHAT[1], {"role": "assistant", "content": "<think>no</think>yes"}]
    tokenizer = copy.deepcopy(llama3_tokenizer())
    tokenizer.add_tokens(["<think>", "</think>"])
    assert find_problem(thinking, control_tokens(tokenizer)) is None
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}"
    assert "control token <think> as text" in str(find_problem(thinking, control_tokens(tokenizer)))


def test_a_special_token_is_no_text_though_no_template_writes_it() -> None:
    tokenizer = copy.deepcopy(llama3_tokenizer())
    tokenizer.add_tokens(AddedToken("<|python_tag|>", special=True), special_tokens=True)
    calling = [CHAT[1], {"role": "assistant", "content": "<|python_tag|>capital()"}]
    assert "<|python_tag|>" not in tokenizer.chat_template
    assert "control token <|python_tag|> as text" in str(find_problem(calling, control_tokens(tokenizer)))


def test_templates_that_cannot_tell_the_spans_are_refused() -> None:
    always_open = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")
    forgetful = (
        "{% for message in messages %}{% if loop.last %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    other_opening = TEMPLATE.replace("{% endif %}", "<think>{% endif %}")
    assert other_opening.count("<think>") == 2
    for template in (always_open, forgetful, other_opening):
        with pytest.raises(ChatError, match="message 2: the chat template does not keep earlier turns"):
            encode(CHAT, llama3_tokenizer(template=template))
    with pytest.raises(UserError, match="no chat template"):
        encode(CHAT, llama3_tokenizer(template=""))


def test_masks_that_say_nothing_are_refused() -> None:
    for num_targets, said in ((0, "nothing to learn"), (5, "headers and users' messages too")):
        with pytest.raises(UserError, match=f"data/chat: .*{said}"):
            refuse_empty_masks(5, num_targets, "data/chat")
    refuse_empty_masks(0, 0, "empty")
    refuse_empty_masks(3, 1, "mixed")


def packed_loss(model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Sum of token losses of one packed batch under a block-diagonal causal mask."""
    document_T = torch.bucketize(torch.arange(len(batch.tokens_T)), batch.cu_seqlens[1:], right=True)
    same = document_T[:, None] == document_T[None, :]
    mask = same & torch.ones_like(same).tril()
    logits = model(
        input_ids=batch.tokens_T[None],
        position_ids=batch.positions_T[None],
        attention_mask=mask[None, None],
    ).logits[0]
    return torch.nn.functional.cross_entropy(logits, batch.labels_T, ignore_index=NO_LABEL, reduction="sum")


def test_packed_and_unpacked_losses_are_equal() -> None:
    """Packing changes no loss and no gradient: against each chat alone through transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = llama3_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
        )
    ).double()  # fmt: skip
    conversations = [CHAT, CHAT[1:3], CHAT[:4], CHAT[:3]]
    encoded: list[EncodedChat] = encode_chats(conversations, tokenizer)

    alone, num_targets = torch.zeros((), dtype=torch.double), 0
    for chat in encoded:
        tokens = torch.tensor(chat.tokens.astype(np.int64))
        labels = torch.where(torch.tensor(chat.mask) == 1, tokens, NO_LABEL)[1:]
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        alone = alone + torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=NO_LABEL, reduction="sum"
        )
        num_targets += int((labels != NO_LABEL).sum())
    alone.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    ends = np.cumsum([len(chat.tokens) for chat in encoded])
    sequence = PackedSequence(
        tokens=np.concatenate([chat.tokens for chat in encoded]),
        boundaries=np.array([0, *ends]),
        mask=np.concatenate([chat.mask for chat in encoded]),
        identity=Identity("chats", "-", 0),
    )
    batch = collate_pieces(sequence.pieces(), int(ends[-1]) + 5)
    packed = packed_loss(model, batch)
    packed.backward()
    assert int((batch.labels_T != NO_LABEL).sum()) == num_targets > 0
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)  # the norms are in single precision
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-5, atol=1e-7)

    bag = list(sequence.pieces())[::-1]
    assert packed_loss(model, collate_pieces(bag)).item() == pytest.approx(alone.item(), rel=1e-6)

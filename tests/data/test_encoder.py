"""Long texts in segments must give the tokens of the whole text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama3 import WORDS, llama3_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_prolong.data import encoder as encoder_module
from megatron_prolong.data.encoder import TextEncoder
from megatron_prolong.errors import UserError

PIECES = [
    *["ab", "zß9", "1", ".", ",", "'", "\n", "\n\n", "\r\n", "\t", "é", "́", "中", "😀"],
    *[
        " ",
        "  ",
        "\n",
        "\n ",
        " \n",
        "don't",
        "I'LL",
        "x1 y",
        "\u00a0",
        "\u2028",
        "<|eot_id|>",
        "12345",
        "---\n",
    ],
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    llama3_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gpt2_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.from_str(llama3_tokenizer().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    path = tmp_path_factory.mktemp("gpt2")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def qwen_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = llama3_tokenizer().backend_tokenizer.to_str().replace("{1,3}", "")
    tokenizer = Tokenizer.from_str(text)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken("is big", lstrip=True)])  # text like any other
    path = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def whole(directory: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=60), size=st.integers(3, 12))
def test_segments_give_the_tokens_of_the_whole_text(
    directory: Path, gpt2_directory: Path, qwen_directory: Path, pieces: list[str], size: int
) -> None:
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "SEGMENT_CHARACTERS", size)
        patch.setattr(encoder_module, "_SEARCH_CHARACTERS", 3)
        for path in (directory, gpt2_directory, qwen_directory):
            encoder = TextEncoder(path)
            assert encoder.splits
            (tokens,) = encoder.encode([text])
            assert tokens.dtype == np.uint32
            assert encoder.forced_cuts or tokens.tolist() == whole(path, text)


def test_real_prose_is_never_cut_by_force(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "SEGMENT_CHARACTERS", 500)
    text = Path(encoder_module.__file__).read_text(encoding="utf-8") * 3
    encoder = TextEncoder(directory)
    assert encoder.encode([text])[0].tolist() == whole(directory, text)
    assert encoder.forced_cuts == 0


def test_a_place_to_cut_is_looked_for_in_the_whole_segment(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "SEGMENT_CHARACTERS", 100)
    monkeypatch.setattr(encoder_module, "_SEARCH_CHARACTERS", 10)
    text, encoder = ("word " + "x" * 60) * 5, TextEncoder(directory)
    assert encoder.encode([text])[0].tolist() == whole(directory, text)
    assert encoder.forced_cuts == 0


def test_a_text_without_any_blank_is_cut_by_force_and_counted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "SEGMENT_CHARACTERS", 100)
    text = "".join(random.Random(0).choices("0123456789abcdef", k=1000))
    encoder = TextEncoder(directory)
    tokens = encoder.encode([text])[0]
    assert encoder.forced_cuts == 9
    assert llama3_tokenizer().decode(tokens.tolist()) == text


def test_batches_keep_texts_apart(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "_BATCH_CHARACTERS", 20)
    texts = ["a b\n" * number for number in range(12)]
    assert [each.tolist() for each in TextEncoder(directory).encode(texts)] == [
        whole(directory, text) for text in texts
    ]


def test_names_of_special_tokens_in_a_text_are_text(directory: Path) -> None:
    (tokens,) = TextEncoder(directory).encode(["a<|eot_id|>b"])
    assert len(tokens) > 3 and llama3_tokenizer().convert_tokens_to_ids("<|eot_id|>") not in tokens


def test_truncation_and_padding_of_the_file_are_switched_off(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["one two three four five six", "a"]
    assert [each.tolist() for each in TextEncoder(tmp_path).encode(texts)] == [
        whole(directory, text) for text in texts
    ]


SPLIT = pre_tokenizers.Split(Regex(WORDS), "isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
STEPS = {
    "blank_in_front": [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    "no_regex": [BYTES],
    "no_bytes": [SPLIT],
    "more": [pre_tokenizers.Digits(), SPLIT, BYTES],
    "blanks_removed": [pre_tokenizers.Split(Regex(WORDS), "removed"), BYTES],
}
ADDED = {"words": "New York", "line": "\nNew", "blank": "big "}


@pytest.mark.parametrize(
    "change", ["prefix", "metaspace", "regex", "unigram", *STEPS, *ADDED, "rstrip", "lstrip"]
)
def test_tokenizers_that_may_not_be_split_are_recognised(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_str(llama3_tokenizer().backend_tokenizer.to_str())
    if change == "prefix":
        tokenizer.normalizer = normalizers.Prepend("▁")
    elif change == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    elif change in STEPS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(STEPS[change])
    elif change in ADDED:  # were cut inside, into other tokens
        tokenizer.add_tokens([AddedToken(ADDED[change], special=False)])
    elif change.endswith("strip"):
        tokenizer.add_tokens([AddedToken("York", special=False, **{change: True})])
    elif change == "regex":
        text = tokenizer.to_str().replace(json.dumps(WORDS)[1:-1], r"\\s+")
        assert text != tokenizer.to_str()
        tokenizer = Tokenizer.from_str(text)
    else:
        tokenizer = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encoder_module, "SEGMENT_CHARACTERS", 5)
    monkeypatch.setattr(encoder_module, "_SEARCH_CHARACTERS", 3)
    encoder, text = TextEncoder(tmp_path), "x\nNew York is big 1 " * 5
    assert encoder.encode([text])[0].tolist() == whole(tmp_path, text)
    assert not encoder.splits


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
        TextEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        TextEncoder(tmp_path)

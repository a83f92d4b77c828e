"""Where answers end, told token by token as a model gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_prolong.evaluation.ending import Ending, cut_at_stop, stop_tokens

EOS = 1


@pytest.fixture(scope="module")
def ending(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.save_pretrained(directory)
    return Ending(directory, frozenset([EOS]))


@pytest.mark.parametrize(
    ("text", "stop", "at", "words"),
    [
        ("one. two", (".",), 4, "one"),
        ("one\n\ntwo! three", ("!", "\n\n"), 5, "one"),  # the longer one counts, and either of them
        ("né no", ("é",), 3, "n"),  # two bytes, so two tokens here
        ("no end", ("!", "?"), None, "no end"),
        ("no end", (), None, "no end"),
    ],
)
def test_an_answer_ends_where_a_stop_text_is_complete(
    text: str, stop: tuple[str, ...], at: int | None, words: str, ending: Ending
) -> None:
    ids = ending.tokenizer.encode(text, add_special_tokens=False)
    assert next((n for n in range(len(ids) + 1) if ending.reached(ids[:n], stop)), None) == at
    assert ending.text(ids[:at], stop) == ending.text([*ids[:at], EOS], stop) == words


def test_an_answer_ends_at_a_stop_token_which_is_no_word_of_it(ending: Ending) -> None:
    ids = ending.tokenizer.encode("end", add_special_tokens=False)
    plain = Ending(Path("no tokenizer here"), frozenset([EOS, ids[-1]]))
    assert plain.reached([*ids[:-1], EOS]) and plain.reached(ids, ["!"]) and not plain.reached([])
    assert not plain.reached([EOS, ids[0]])
    assert Ending(ending.directory, plain.stop_ids).text(ids) == "en"
    assert ending.text([0, *ids]) == "end", "no special token is a word"


def test_an_answer_is_cut_at_the_first_stop_text() -> None:
    assert cut_at_stop("a, b. c, d", [".", ","]) == "a" and cut_at_stop("a", []) == "a"


def test_stop_tokens_are_a_number_or_a_list_or_none() -> None:
    assert (stop_tokens(None), stop_tokens(2), stop_tokens([2, 3])) == (set(), {2}, {2, 3})

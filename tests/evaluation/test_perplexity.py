"""Losses by context and by position of a model whose every loss is known, and the passages they are of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.errors import UserError
from megatron_prolong.evaluation.backend import ScoringBackend
from megatron_prolong.evaluation.documents import Passage, check_documents, read_passages, read_text
from megatron_prolong.evaluation.perplexity import measure
from megatron_prolong.evaluation.report import print_perplexity


class Known:
    """The loss of a token is its number, and one nat more for each token of context."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    batch_size = 2

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        assert len(sequences) <= self.batch_size
        return [-(np.array(ids[1:], dtype=np.float32) + len(ids)) for ids in sequences]


def test_losses_by_context_are_of_the_same_tokens_and_by_position_of_the_longest(
    tokenizer: Any,
) -> None:
    passages = [Passage(str(first), np.arange(first, first + 1024)) for first in (0, 1000)]
    found = measure(cast(ScoringBackend, Known(tokenizer)), passages, [1024, 256, 1024])
    assert found.window == 128
    last = 1023 - 127 / 2  # mean of the last 128 tokens of the first passage
    assert [(at.context, at.loss) for at in found.by_context] == [
        (length, pytest.approx(last + 500 + length)) for length in (256, 1024)
    ]
    assert found.by_context[0].passage_losses == pytest.approx((last + 256, last + 1256))
    edges = [(1, 128), (128, 256), (256, 512), (512, 1024)]
    assert [(bucket.start, bucket.end) for bucket in found.by_position] == edges
    for bucket in found.by_position:
        mean = (bucket.start + bucket.end - 1) / 2 + 1024
        assert bucket.passage_losses == pytest.approx((mean, mean + 1000))
        assert bucket.loss == pytest.approx(mean + 500)


def test_the_window_is_never_more_than_256_tokens(tokenizer: Any) -> None:
    passages = [Passage("", np.arange(2000))]
    found = measure(cast(ScoringBackend, Known(tokenizer)), passages, [2000, 1500])
    assert found.window == 256
    assert [(bucket.start, bucket.end) for bucket in found.by_position][-1] == (1024, 2000)


def test_losses_of_unlike_tokens_are_shown_with_a_warning(
    tokenizer: Any, byte_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A larger vocabulary puts more text into a token, whose loss is then the larger one."""
    (tmp_path / "a.txt").write_text("The special magic number is mentioned in the text. " * 20)
    found = {}
    for label, own in {"a": tokenizer, "b": tokenizer, "c": byte_tokenizer}.items():
        passages = read_passages([tmp_path], own, 64, 1, seed=1)
        found[label] = measure(cast(ScoringBackend, Known(own)), passages, [32, 64])
    print_perplexity({label: found[label] for label in "ab"})
    assert not capsys.readouterr().err
    print_perplexity(found)
    assert f"c: {found['c'].tokenizer}" in capsys.readouterr().err
    assert found["c"].tokenizer.endswith(" tokens") and found["c"].tokenizer != found["a"].tokenizer


def test_passages_begin_documents_that_are_long_enough(tmp_path: Path, tokenizer: Any) -> None:
    with MDSWriter(
        tmp_path / "packs", {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32"}
    ) as writer:
        ids, edges = np.arange(100, dtype=np.uint32), np.array([[0, 60], [60, 100]], np.uint32)
        writer.write({"input_ids": ids, "indices": edges})
    passages = read_passages([tmp_path], tokenizer, 40, 9, seed=1)
    assert [passage.tokens.tolist() for passage in passages] == [list(range(40)), list(range(60, 100))]
    assert len(read_passages([tmp_path], tokenizer, 41, 9, seed=1)) == 1
    with pytest.raises(UserError, match="no document of 61 tokens, the longest has 60"):
        read_passages([tmp_path], tokenizer, 61, 9, seed=1)


def test_passages_are_read_from_records_too(tmp_path: Path, tokenizer: Any) -> None:
    """JSON Lines, compressed or not, and Parquet give the passages that text files of the same words give."""
    words = [f"The special magic number {n} is mentioned in the text. " * 9 for n in range(3)]
    (tmp_path / "text").mkdir()
    for number, text in enumerate(words):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    (tmp_path / "text" / "sizes.json").write_text('{"of": "the texts"}')
    (tmp_path / "text" / "README.md").write_text("Shorter than a passage.")
    records = "".join(json.dumps({"text": text}) + "\n" for text in words)
    (tmp_path / "records.jsonl").write_text(records)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("A data set. " * 99)
    (tmp_path / "folder" / "records.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": words}), tmp_path / "records.parquet")
    wanted = [
        passage.tokens.tolist() for passage in read_passages([tmp_path / "text"], tokenizer, 64, 9, seed=1)
    ]
    assert len({tuple(tokens) for tokens in wanted}) == 3
    for name in ("records.jsonl", "folder", "records.parquet"):
        found = read_passages([tmp_path / name], tokenizer, 64, 9, seed=1)
        assert [passage.tokens.tolist() for passage in found] == wanted, name
    check_documents([tmp_path / name for name in ("text", "records.jsonl", "folder", "records.parquet")], [])
    (tmp_path / "records.jsonl").write_text(records + "{")
    with pytest.raises(UserError, match="is not JSON"):
        read_passages([tmp_path / "records.jsonl"], tokenizer, 64, 9, seed=1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.arange(9, dtype=np.uint32).tobytes(), "is not text: it holds a byte of zero"),
        ("Grüße".encode("latin-1"), r"is not UTF-8 \(byte 2\)"),
    ],
    ids=["tokens", "latin-1"],
)
def test_what_is_no_text_is_refused_whatever_its_name(tmp_path: Path, content: bytes, said: str) -> None:
    """It was measured as if its bytes were words."""
    file = tmp_path / "tokens.bin"
    file.write_bytes(content)
    for look in (lambda: check_documents([file], []), lambda: read_text(file)):
        with pytest.raises(UserError, match=rf"tokens\.bin {said}"):
            look()
    file.write_text("int main() {}  // Grüße")
    check_documents([file], [])
    assert read_text(file) == "int main() {} // Grüße"


def test_a_folder_may_hold_nothing_but_a_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("All there is.")
    assert read_text(tmp_path) == "All there is."

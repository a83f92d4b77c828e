from pathlib import Path

import numpy as np
import pytest
from documents import write_documents
from hypothesis import given
from hypothesis import strategies as st
from packs import add_foreign_columns, numbered_packs, write_packs

from megatron_prolong.data.filter import FilterOptions, filter_documents
from megatron_prolong.data.inspect import survey
from megatron_prolong.data.mds import MDSWriter
from megatron_prolong.data.megatron_indexed import to_megatron
from megatron_prolong.data.mixture import Mixture, SampleRef
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.data.packed import Identity, PackedSequence, open_tokens
from megatron_prolong.data.sources import Record, source_of
from megatron_prolong.data.verify import verify
from megatron_prolong.errors import UserError

HERE = Identity("data/books", "shard.00002.mds", 17)


def sample(num_tokens: int, **columns: object) -> dict[str, object]:
    return {"input_ids": np.arange(num_tokens, dtype=np.uint32), **columns}


def test_data_sets_with_samples_have_tokens(tmp_path: Path) -> None:
    for text in ([], ["hello"]):
        with MDSWriter(tmp_path / f"{len(text)}", {"text": "str"}) as writer:
            for each in text:
                writer.write({"text": each})
    assert len(open_tokens(tmp_path / "0")) == 0
    with pytest.raises(UserError, match="1: no column input_ids, only text; tokenize it first"):
        open_tokens(tmp_path / "1")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_pieces_are_the_documents_the_indices_name(lengths: list[int]) -> None:
    ends = np.cumsum(lengths)
    indices = np.stack([ends - lengths, ends], axis=1).astype(np.uint32)
    mask = (np.arange(ends[-1]) % 2).astype(np.uint8)
    packed = PackedSequence.from_sample(
        sample(int(ends[-1]), indices=indices, mask=mask), HERE, loss_mask=True
    )
    assert packed.document_lengths.tolist() == lengths
    assert packed.num_documents == len(lengths)
    for piece, (start, end) in zip(packed.pieces(), indices, strict=True):
        assert piece.tokens.tolist() == list(range(start, end))
        assert piece.mask is not None and piece.mask.tolist() == [n % 2 for n in range(start, end)]


def test_without_indices_it_is_one_document() -> None:
    packed = PackedSequence.from_sample(sample(5), HERE)
    assert packed.boundaries.tolist() == [0, 5] and packed.boundaries.dtype == np.int64
    assert packed.mask is None


def test_empty_spans_vanish() -> None:
    indices = np.array([[0, 0], [0, 3], [3, 3], [3, 5]], np.uint32)
    assert PackedSequence.from_sample(sample(5, indices=indices), HERE).boundaries.tolist() == [0, 3, 5]


def test_mask_column_is_ignored_unless_asked_for() -> None:
    assert PackedSequence.from_sample(sample(4, mask=np.zeros(4, np.uint8)), HERE).mask is None


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64"])
def test_a_mask_is_whatever_integer_is_not_zero(dtype: str) -> None:
    """datatools writes uint32, with the ids of added beginnings and ends of text among the zeros and ones."""
    stored = np.array([0, 1, 100 if dtype == "uint8" else 256, 0, 1]).astype(dtype)
    packed = PackedSequence.from_sample(sample(5, mask=stored), HERE, loss_mask=True)
    assert packed.mask is not None and packed.mask.dtype == np.uint8
    assert packed.mask.tolist() == [0, 1, 1, 0, 1]


def test_arrays_do_not_refer_to_the_file() -> None:
    raw = sample(4, mask=np.ones(4, np.uint8))
    packed = PackedSequence.from_sample(raw, HERE, loss_mask=True)
    assert packed.mask is not None
    assert not np.shares_memory(packed.tokens, raw["input_ids"])  # type: ignore[arg-type]
    assert not np.shares_memory(packed.mask, raw["mask"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"input_ids": np.zeros(3, np.int64)}, r"must be uint32 \[S\], found int64 \[3\]"),
        ({"input_ids": np.zeros((3, 1), np.uint32)}, r"found uint32 \[3, 1\]"),
        ({"input_ids": 3}, r"must be uint32 \[S\], found int64 \[\]"),  # of a column of numbers
        (sample(0, indices=np.zeros((0, 2), np.uint32)), "input_ids is empty"),
        (sample(5, indices=np.array([0, 5], np.uint32)), r"must be \[documents, 2\], found \[2\]"),
        (sample(5, indices=np.array([[0, 5, 5]], np.uint32)), r"must be \[documents, 2\], found \[1, 3\]"),
        (sample(5, indices=np.array([[0, 2], [3, 5]], np.uint32)), r"span \[3, 5\).*ends at 2"),
        (sample(5, indices=np.array([[0, 3], [2, 5]], np.uint32)), r"span \[2, 5\).*ends at 3"),
        (sample(5, indices=np.array([[1, 5]], np.uint32)), r"span \[1, 5\).*ends at 0"),
        (sample(5, indices=np.array([[0, 4], [4, 2]], np.uint32)), r"span \[4, 2\)"),
        (sample(5, indices=np.array([[0, 4]], np.uint32)), "indices end at 4, the sequence has 5"),
        (sample(5, indices=np.array([[0, 6]], np.uint32)), "indices end at 6, the sequence has 5"),
        (sample(5), "no column mask"),
        (sample(5, mask=np.ones(4, np.uint8)), r"mask must be integers \[5\].*found uint8 \[4\]"),
        (sample(5, mask=np.ones(5, np.float32)), r"found float32 \[5\]"),
    ],
)
def test_what_is_wrong_names_the_sample(raw: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        PackedSequence.from_sample(raw, HERE, loss_mask="mask" in raw or "mask" in said)
    assert str(error.value).startswith("data/books, shard shard.00002.mds, sample 17: ")


def test_columns_that_nobody_needs_may_be_of_any_type(tmp_path: Path) -> None:
    """Each of these refused the whole data set."""
    packs = write_packs(tmp_path / "packs", numbered_packs(4))
    plain = write_documents(tmp_path / "plain", [10, 12])
    text = tmp_path / "text"
    with MDSWriter(text, {"text": "str"}) as writer:
        writer.write({"text": "hello"})
    for directory in (packs, plain, text):
        add_foreign_columns(directory)
    mixture = Mixture({packs: 1.0}, sequence_length=8, batch_sequences=2, seed=0, num_steps=2)
    assert mixture.read(mixture.batch(0)[0]).num_tokens == 8
    assert [domain.num_tokens for domain in survey(packs)] == [32]
    assert verify(packs).problems == [] and to_megatron(packs, tmp_path / "indexed") == 4
    report = pack([plain], tmp_path / "packed", PackOptions(11, "concat"))
    assert report is not None and report.packed == 22
    kept = filter_documents([plain], tmp_path / "kept", FilterOptions(min_length={"": 11}))
    assert kept is not None and kept.kept_tokens == 12
    (record,) = [found for part in source_of("mds").parts(str(text)) for found in source_of("mds").read(part)]
    assert isinstance(record, Record) and record.fields["text"] == "hello"


def test_a_mask_that_the_stage_does_not_read_may_be_of_any_type(tmp_path: Path) -> None:
    packs = write_packs(tmp_path / "packs", [[[1, 2, 3, 4]]], masks=[[[1, 0, 1, 1]]])
    index = packs / "index.json"
    index.write_text(index.read_text().replace('"ndarray:uint8"', '"pkl"'))
    run = {"sequence_length": 4, "batch_sequences": 1, "seed": 0, "num_steps": 1}
    assert Mixture({packs: 1.0}, **run).read(SampleRef(0, 0)).num_tokens == 4
    with pytest.raises(UserError, match="packs, column mask: columns of type pkl are not read"):
        Mixture({packs: 1.0}, loss_mask=True, **run)

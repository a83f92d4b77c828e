import fcntl
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import write_packs

from megatron_prolong.data import megatron_indexed
from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.megatron_indexed import IndexedReader, IndexedWriter, from_megatron, to_megatron
from megatron_prolong.errors import UserError

PACKS = [[[1, 2, 3], [4]], [[128_255, 6]], [[7], [8], [9, 10, 11]]]


def megatron_reads(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """Megatron-Core's own view: the sequences, and where its documents begin."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return [dataset[number].tolist() for number in range(len(dataset))], dataset.document_indices.tolist()


def megatron_writes(prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_megatron_reads_what_we_write(tmp_path: Path) -> None:
    assert to_megatron(write_packs(tmp_path / "mds", PACKS), tmp_path / "out" / "tokens") == 3
    sequences, documents = megatron_reads(tmp_path / "out" / "tokens")
    assert sequences == [document for pack in PACKS for document in pack]
    assert documents == [0, 2, 3, 6]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokens.bin", "tokens.idx"]


def test_our_files_are_megatrons_byte_for_byte(tmp_path: Path) -> None:
    to_megatron(write_packs(tmp_path / "mds", PACKS), tmp_path / "ours")
    megatron_writes(tmp_path / "theirs", PACKS, np.int32)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type) -> None:
    largest = min(int(np.iinfo(dtype).max), 2**32 - 1)
    documents = [[[1, 2], [3]], [[4, 5, largest]], [[7]]]
    megatron_writes(tmp_path / "theirs", documents, dtype)
    assert from_megatron(tmp_path / "theirs", tmp_path / "mds", "books") == (3, 0)
    samples = list(MDSReader(tmp_path / "mds"))
    assert [sample["input_ids"].tolist() for sample in samples] == [[1, 2, 3], [4, 5, largest], [7]]
    assert [sample["indices"].tolist() for sample in samples] == [[[0, 2], [2, 3]], [[0, 3]], [[0, 1]]]
    assert {sample["domain"] for sample in samples} == {"books"}
    assert [sample["length"] for sample in samples] == [3, 3, 1]
    if np.iinfo(dtype).min < 0:
        megatron_writes(tmp_path / "minus", [[[-1]]], dtype)
        with pytest.raises(UserError, match="token -1 is no token id"):
            IndexedReader(tmp_path / "minus")[0]


packs = st.lists(
    st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25)
@given(packs)
def test_there_and_back_keeps_tokens_and_boundaries(
    tmp_path_factory: pytest.TempPathFactory, packs: list[list[list[int]]]
) -> None:
    root = tmp_path_factory.mktemp("round")
    to_megatron(write_packs(root / "mds", packs), root / "tokens")
    from_megatron(root / "tokens", root / "back", "test")
    before, after = list(MDSReader(root / "mds")), list(MDSReader(root / "back"))
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
        whole = [[0, len(one["input_ids"])]]
        assert one["indices"].tolist() == np.array(other.get("indices", whole)).tolist()


def test_unpacked_documents_get_no_indices_and_empty_ones_are_counted(tmp_path: Path) -> None:
    megatron_writes(tmp_path / "theirs", [[[1, 2]], [[]], [], [[3]]], np.int32)
    assert from_megatron(tmp_path / "theirs", tmp_path / "mds", "books") == (2, 2)
    reader = MDSReader(tmp_path / "mds")
    assert sorted(reader.columns) == ["domain", "input_ids", "length"]
    assert [sample["input_ids"].tolist() for sample in reader] == [[1, 2], [3]]


def test_a_data_set_without_documents_has_none(tmp_path: Path) -> None:
    megatron_writes(tmp_path / "theirs", [], np.int32)
    assert list(IndexedReader(tmp_path / "theirs")) == []


def test_an_empty_sequence_in_a_pack_vanishes(tmp_path: Path) -> None:
    megatron_writes(tmp_path / "theirs", [[[1, 2], [], [3]]], np.int32)
    from_megatron(tmp_path / "theirs", tmp_path / "mds", "books")
    assert MDSReader(tmp_path / "mds")[0]["indices"].tolist() == [[0, 2], [2, 3]]


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    masked = write_packs(tmp_path / "chat", [[[1, 2]]], masks=[[[0, 1]]])
    with pytest.raises(UserError, match=r"chat has a mask column"):
        to_megatron(masked, tmp_path / "out")
    with pytest.raises(UserError, match=r"sample 0: token 2147483648 does not fit"):
        to_megatron(write_packs(tmp_path / "big", [[[2**31]]]), tmp_path / "out")
    with MDSWriter(tmp_path / "text", {"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match="text: no column input_ids, only text; tokenize it first"):
        to_megatron(tmp_path / "text", tmp_path / "out")
    packs = write_packs(tmp_path / "packs", [[[1, 2]]])
    for name in ("out.bin", "out.idx"):
        with pytest.raises(UserError, match=r"out\.\w+: .* give the prefix, .*/out$"):
            to_megatron(packs, tmp_path / name)
    for name in (".", "a/.."):  # hidden files: ..bin
        with pytest.raises(UserError, match=rf"^{re.escape(name)}: is a directory, .*; give {name}/NAME$"):
            to_megatron(packs, Path(name))
    assert not list(tmp_path.glob("out*")), "nothing half-written is left"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.idx").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"out\.idx exists already"):
        IndexedWriter(tmp_path / "out")
    assert (tmp_path / "out.idx").read_bytes() == b"precious"
    with pytest.raises(UserError, match="is the address of a server"):
        IndexedWriter(Path("gs://bucket/out"))


def test_what_a_kill_between_the_two_files_left_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repeat was refused, and named a file that nothing could read."""
    source, published = write_packs(tmp_path / "mds", PACKS), megatron_indexed.publish

    def killed(partial: Path, final: Path) -> None:
        if final.suffix == ".idx":
            raise KeyboardInterrupt
        published(partial, final)

    with monkeypatch.context() as patch:
        patch.setattr(megatron_indexed, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == ["out.bin"]
    assert to_megatron(source, tmp_path / "out") == len(PACKS) == len(IndexedReader(tmp_path / "out"))


def test_what_a_kill_left_in_the_making_goes_with_the_next_attempt(tmp_path: Path) -> None:
    source = write_packs(tmp_path / "mds", PACKS)
    program = (
        "import os, signal\n"
        "from megatron_prolong.data import megatron_indexed\n"
        "megatron_indexed.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"megatron_indexed.to_megatron({str(source)!r}, {str(tmp_path / 'out')!r})\n"
    )
    killed = subprocess.run([sys.executable, "-c", program])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("out.*.tmp-*"))) == 2
    (tmp_path / "outer.bin.tmp-prolong-host-1").touch()  # of another prefix
    (tmp_path / "out.bin.tmp-mine").touch()  # a user's
    with (tmp_path / "out.bin.tmp-prolong-elsewhere-7").open(
        "wb"
    ) as file:  # as of a process of another machine
        fcntl.flock(file, fcntl.LOCK_EX)
        to_megatron(source, tmp_path / "out")
        left = {path.name for path in tmp_path.glob("out*")}
        assert left == {
            "out.bin",
            "out.idx",
            "out.bin.tmp-mine",
            "outer.bin.tmp-prolong-host-1",
            "out.bin.tmp-prolong-elsewhere-7",
        }


def test_damaged_files_are_named(tmp_path: Path) -> None:
    to_megatron(write_packs(tmp_path / "mds", PACKS), tmp_path / "ok")
    tokens, index = (tmp_path / "ok.bin").read_bytes(), (tmp_path / "ok.idx").read_bytes()
    header = 9 + 8 + 1 + 8 + 8
    broken = {
        "absent": (None, index, r"absent\.bin: no such file"),
        "short": (tokens[:-4], index, r"short\.bin has 40 bytes, its index names 44"),
        "cut": (tokens, index[:-1], r"cut\.idx has \d+ bytes, its header says \d+"),
        "modes": (tokens, index + bytes(6), "multimodal"),
        "magic": (tokens, b"X" + index[1:], "wrong first bytes"),
        "stub": (tokens, index[:12], "wrong first bytes"),
        "float": (tokens, index[:17] + b"\x07" + index[18:], "element code 7"),
        "version": (tokens, index[:9] + b"\x02" + index[10:], "version 2"),
        "documents": (tokens, index[: -8] + (5).to_bytes(8, "little"), "do not cover its 6 sequences"),
        "negative": (tokens, index[:header] + b"\xff" * 4 + index[header + 4 :], "do not cover"),
        "before": (tokens, index[: header + 24 + 8] + (-8).to_bytes(8, "little", signed=True)
                   + index[header + 24 + 16 :], "do not cover"),
        "between": (tokens, index[: header + 24 + 8] + (6).to_bytes(8, "little") + index[header + 24 + 16 :],
                    "do not cover"),
        "late": (tokens, index[: header + 72] + (1).to_bytes(8, "little") + index[header + 80 :], "do not cover"),
        "back": (tokens, index[: header + 80] + (6).to_bytes(8, "little") + index[header + 88 :], "do not cover"),
        "none": (tokens, index[: header - 8] + bytes(8) + index[header : header + 72], "do not cover"),
    }  # fmt: skip
    for name, (token_bytes, index_bytes, said) in broken.items():
        if token_bytes is not None:
            (tmp_path / f"{name}.bin").write_bytes(token_bytes)
        (tmp_path / f"{name}.idx").write_bytes(index_bytes)
        with pytest.raises(UserError, match=said):
            IndexedReader(tmp_path / name)
    (tmp_path / "minus.bin").write_bytes(b"\xff" * len(tokens))
    (tmp_path / "minus.idx").write_bytes(index)
    with pytest.raises(UserError, match=r"minus\.bin, document 0: token -1 is no token id"):
        IndexedReader(tmp_path / "minus")[0]
    megatron_writes(tmp_path / "wide", [[[1, 2**32 - 1]], [[1, 2**32]]], np.int64)
    assert IndexedReader(tmp_path / "wide")[0][0].tolist() == [1, 2**32 - 1]
    with pytest.raises(UserError, match=r"wide\.bin, document 1: token 4294967296 is no token id"):
        IndexedReader(tmp_path / "wide")[1]


def test_a_killed_import_leaves_nothing_beside_the_next(tmp_path: Path) -> None:
    to_megatron(write_packs(tmp_path / "mds", PACKS), tmp_path / "theirs")
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from megatron_prolong.data import megatron_indexed\n"
        "megatron_indexed.MDSWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"megatron_indexed.from_megatron(Path({str(tmp_path)!r}, 'theirs'), Path({str(tmp_path)!r}, 'out'), 'x')\n"
    )
    killed = subprocess.run([sys.executable, "-c", program])
    assert killed.returncode == -signal.SIGKILL and list(tmp_path.glob("out.tmp-*"))
    from_megatron(tmp_path / "theirs", tmp_path / "out", "x")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]

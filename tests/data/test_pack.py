"""Packing data sets: tokens, boundaries and masks end up where the plan says, for any number of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from documents import files_of, mask_of, tokens_of, write_documents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prolong.data import documents as documents_module
from megatron_prolong.data import pack as pack_module
from megatron_prolong.data.executors import LocalProcesses
from megatron_prolong.data.filter import FilterOptions, filter_documents
from megatron_prolong.data.inspect import survey
from megatron_prolong.data.mds import MDSReader, MDSWriter, merge_tree
from megatron_prolong.data.pack import PackOptions, PackReport, pack
from megatron_prolong.errors import UserError


def packed(inputs: list[Path], out: Path, options: PackOptions) -> PackReport:
    report = pack(inputs, out, options)
    assert report is not None
    return report


def subsets(out: Path, report: PackReport) -> list[MDSReader]:
    return [MDSReader(out / subset) for subset in report.packs]


ADDED = {
    "bos": st.sampled_from([None, 7]),
    "eos": st.sampled_from([None, 9]),
    "shuffle_seed": st.sampled_from([None, 0]),
}
WHOLE_PACKS = ADDED | {
    "length": st.integers(12, 40),
    "mode": st.sampled_from(["concat", "bestfit"]),
    "min_length": st.integers(1, 10),
}
OPTIONS = st.one_of(
    st.builds(PackOptions, **WHOLE_PACKS, overlap=st.integers(0, 9)),
    st.builds(PackOptions, **WHOLE_PACKS, intact=st.just(True)),
    st.builds(
        PackOptions,
        **ADDED,
        length=st.just(48),
        mode=st.just("single"),
        lengths=st.sampled_from([(), (48,), (12, 24), (16, 48)]),
        overlap=st.integers(0, 9),
    ),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=20), options=OPTIONS, data=st.data())
def test_every_piece_is_a_run_of_its_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], options: PackOptions, data: st.DataObject
) -> None:
    """Tokens say where they are from, so each span must be consecutive tokens of one document with its mask."""
    path = tmp_path_factory.mktemp("pack")
    half = data.draw(st.integers(0, len(lengths) - 1))
    inputs = [write_documents(path / "b", lengths[half:], first=half + 1, mask=True)]
    if half:
        inputs.insert(0, write_documents(path / "a", lengths[:half], mask=True))
    try:
        report = packed(inputs, path / "packs", options)
    except UserError as error:
        assert "not a single pack" in str(error)
        return
    assert report.tokens == sum(lengths) and report.documents == len(lengths) and report.balances
    found = 0
    for reader in subsets(path / "packs", report):
        for sample in reader:
            tokens, spans = sample["input_ids"], sample["indices"]
            found += len(tokens)
            assert sample["length"] == len(tokens) <= options.length
            assert options.mode == "bestfit" or len(tokens) == options.length
            assert spans[0, 0] == 0 and spans[-1, 1] == len(tokens)
            np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])
            for start, end in spans:
                check_span(tokens[start:end], sample["mask"][start:end], lengths, options)
    assert found == report.packed
    assert report.capacity == options.length * sum(map(len, subsets(path / "packs", report)))
    assert report.added == len(lengths) * ((options.bos is not None) + (options.eos is not None))


def test_a_data_set_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """Also by another name, and one that a merged index holds already: every document would be there twice."""
    one = write_documents(tmp_path / "all" / "one", [20])
    write_documents(tmp_path / "all" / "two", [20])
    merge_tree(tmp_path / "all")
    (tmp_path / "link").symlink_to(one)
    for again in (one, one / ".." / "one", tmp_path / "link", tmp_path / "all"):
        message = f"{one}/shard.00000.mds and {again}/.*shard.00000.mds are the same, whose documents would"
        with pytest.raises(UserError, match=message):
            pack([one, again], tmp_path / "out", PackOptions(10, "concat"))
        with pytest.raises(UserError, match=message):
            filter_documents([one, again], tmp_path / "out", FilterOptions(duplicates=True))
    assert not (tmp_path / "out.partial").exists()
    assert packed([one, tmp_path / "all" / "two"], tmp_path / "out", PackOptions(10, "concat")).documents == 2


def check_span(tokens: np.ndarray, mask: np.ndarray, lengths: list[int], options: PackOptions) -> None:
    begins, ends = tokens[0] == options.bos, tokens[-1] == options.eos
    if begins:
        assert mask[0] == 0
    if ends:
        assert mask[-1] == 0
    body = tokens[int(begins) : len(tokens) - int(ends)]
    if not len(body):
        return
    number, start = divmod(int(body[0]), 1000)
    stop = start + len(body)
    np.testing.assert_array_equal(body, tokens_of(number, lengths[number - 1])[start:stop])
    np.testing.assert_array_equal(mask[int(begins) : len(tokens) - int(ends)], mask_of(number, stop)[start:])
    assert start == 0 or not begins
    assert stop == lengths[number - 1] or not ends


def test_packing_packs_again_keeps_the_boundaries(tmp_path: Path) -> None:
    inputs = [write_documents(tmp_path / "documents", [5, 9, 3, 20, 11])]
    packed(inputs, tmp_path / "short", PackOptions(12, "concat"))
    report = packed([tmp_path / "short"], tmp_path / "long", PackOptions(24, "concat"))
    first, second = MDSReader(tmp_path / "short"), MDSReader(tmp_path / "long")
    assert report.documents == sum(len(each["indices"]) for each in first)
    together = np.concatenate([each["input_ids"] for each in first])
    np.testing.assert_array_equal(np.concatenate([each["input_ids"] for each in second]), together[:48])
    assert second[0]["indices"].tolist() == [[0, 5], [5, 12], [12, 14], [14, 17], [17, 24]]


def test_documents_and_packs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of documents would be lost if those of all inputs had to have some."""
    monkeypatch.setattr(documents_module, "_BLOCK_DOCUMENTS", 3)
    plain = write_documents(tmp_path / "plain", [5, 9])
    packed([plain], tmp_path / "short", PackOptions(12, "concat"))
    for inputs, first in (([plain, tmp_path / "short"], 5), ([tmp_path / "short", plain], 5)):
        report = packed(inputs, tmp_path / f"long{inputs[0].name}", PackOptions(26, "concat"))
        assert (report.documents, report.tokens) == (4, 26)
        (sample,) = MDSReader(tmp_path / f"long{inputs[0].name}")
        assert len(sample["indices"]) == 4 and sample["indices"][0].tolist() == [0, first]
        with pytest.raises(UserError, match="packed already"):
            filter_documents(inputs, tmp_path / "kept", FilterOptions(min_length={"": 1}))


def test_chunks_of_each_length_fill_packs_of_their_own(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents", [8, 4, 9, 4, 3])
    report = packed([source], tmp_path / "packs", PackOptions(8, "single", lengths=(4, 8)))
    assert report.packs == {"4-8": 1, "8-8": 2}
    assert report.dropped == {"document shorter than a chunk": 3, "remainder shorter than a chunk": 1}
    (fours,), (first, _) = subsets(tmp_path / "packs", report)
    assert fours["indices"].tolist() == [[0, 4], [4, 8]]
    np.testing.assert_array_equal(fours["input_ids"], np.concatenate([tokens_of(2, 4), tokens_of(4, 4)]))
    np.testing.assert_array_equal(first["input_ids"], tokens_of(1, 8))
    assert list(packed([source], tmp_path / "alone", PackOptions(8, "single")).packs) == [""]


def test_bos_and_eos_are_not_doubled(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "documents", {"input_ids": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.array([7, 1, 2, 9], np.uint32)})
        writer.write({"input_ids": np.array([3, 4], np.uint32)})
    for name, ids, expected in (
        ("both", {"bos": 7, "eos": 9}, [7, 1, 2, 9, 7, 3, 4, 9]),
        ("bos", {"bos": 7}, [7, 1, 2, 9, 7, 3, 4]),
        ("eos", {"eos": 9}, [7, 1, 2, 9, 3, 4, 9]),
    ):
        options = PackOptions(len(expected), "concat", **ids)
        assert packed([tmp_path / "documents"], tmp_path / name, options).added == len(expected) - 6
        assert MDSReader(tmp_path / name)[0]["input_ids"].tolist() == expected
    with MDSWriter(tmp_path / "pack", {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32"}) as writer:
        spans = np.array([[0, 3], [3, 6], [6, 8]], np.uint32)
        writer.write({"input_ids": np.array([7, 1, 9, 3, 4, 9, 7, 5], np.uint32), "indices": spans})
    packed([tmp_path / "pack"], tmp_path / "again", PackOptions(10, "concat", bos=7, eos=9))
    assert MDSReader(tmp_path / "again")[0]["input_ids"].tolist() == [7, 1, 9, 7, 3, 4, 9, 7, 5, 9]


def test_domains(tmp_path: Path) -> None:
    books = write_documents(tmp_path / "books", [6, 6], domain="books")
    code = write_documents(tmp_path / "code", [6, 6], domain="code")
    packed([books, code], tmp_path / "packs", PackOptions(8, "concat"))
    assert [each["domain"] for each in MDSReader(tmp_path / "packs")] == ["books", "books+code", "code"]
    packed([books, code], tmp_path / "named", PackOptions(8, "concat", domain="mix"))
    assert [each["domain"] for each in MDSReader(tmp_path / "named")] == ["mix"] * 3


def test_packs_do_not_depend_on_workers_or_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 60).tolist()
    one = write_documents(tmp_path / "one", lengths)
    many = write_documents(tmp_path / "many", lengths, size_limit=900)
    options = PackOptions(32, "concat", shuffle_seed=1)
    pack([one], tmp_path / "whole", options)
    monkeypatch.setattr(pack_module, "TASK_TOKENS", 64)
    monkeypatch.setattr(pack_module, "_BLOCK", 7)
    pack([one], tmp_path / "a", options)
    pack([one], tmp_path / "b", options, executor=LocalProcesses(3))
    pack([many], tmp_path / "c", options)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert len(a) > 50 and a == b
    for whole, pieced in zip(MDSReader(tmp_path / "whole"), MDSReader(tmp_path / "a"), strict=True):
        np.testing.assert_array_equal(whole["input_ids"], pieced["input_ids"])
    c["job.json"] = a["job.json"]  # which names its input
    assert a == c


def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed for real: a process that packs is sent SIGKILL after some tasks are done."""
    source = write_documents(tmp_path / "documents", [97] * 200)
    program = (
        "import sys; from megatron_prolong.data import pack as p; p.TASK_TOKENS = 64\n"
        "p.pack([sys.argv[1]], sys.argv[2], p.PackOptions(64, 'concat'))"
    )
    command = [sys.executable, "-c", program, str(source)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*command, str(tmp_path / "killed")])
    partial = tmp_path / "killed.partial"
    finished = "0[0-9][0-9][0-9][0-9]/index.json"  # not 00006.tmp-HOST-PID, being written as the kill came
    while process.poll() is None and len(list(partial.glob(finished))) < 5:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "killed").exists()
    done = {
        path: path.stat().st_ino for path in partial.glob(finished.replace("index.json", "shard.00000.mds"))
    }
    assert len(done) >= 5
    (partial / "00999999.tmp-1").mkdir()  # as a worker killed at work leaves behind
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert not partial.exists()
    for path, inode in done.items():
        assert (tmp_path / "killed" / path.relative_to(partial)).stat().st_ino == inode, "done again"


def test_running_again_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents", [30] * 10)
    first = packed([source], tmp_path / "packs", PackOptions(16, "concat"))
    before = files_of(tmp_path / "packs")
    assert packed([source], tmp_path / "packs", PackOptions(16, "concat")) == first
    assert files_of(tmp_path / "packs") == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists already"):
        packed([source], tmp_path / "file", PackOptions(16, "concat"))
    with pytest.raises(UserError, match="packs exists already"):
        pack([source], tmp_path / "packs", PackOptions(8, "concat"))
    packed([source], tmp_path / "chunks", PackOptions(16, "single", lengths=(8, 16)))
    with pytest.raises(UserError, match="chunks exists already"):
        pack([source], tmp_path / "chunks", PackOptions(16, "single", lengths=(4, 16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length 0 must be at least 1"),
        ({"mode": "best"}, "mode 'best' is none of"),
        ({"lengths": (5,)}, "lengths belong to mode single"),
        ({"mode": "single", "lengths": (5, 16)}, "chunk length 5 does not divide the pack's length 16"),
        ({"mode": "single", "lengths": (0, 16)}, "chunk length 0 does not divide the pack's length 16"),
        ({"overlap": 16}, "overlap 16 must be less than"),
        ({"mode": "single", "lengths": (8,), "overlap": 8}, "overlap 8 must be less than"),
        ({"min_length": 17}, "min_length 17 is longer than a pack"),
        ({"overlap": 1, "intact": True}, "overlap 1 has no effect with intact"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackOptions(**({"length": 16, "mode": "concat"} | options))


def test_nothing_to_pack_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "documents", [30] * 10)
    with pytest.raises(
        UserError, match=r"not a single pack of 64 tokens.*\n.*shorter than a chunk: 300 tokens"
    ):
        pack([source], tmp_path / "packs", PackOptions(64, "single"))
    assert [path.name for path in tmp_path.iterdir()] == ["documents"]


def test_masks_of_any_integers_stay_what_they_say(tmp_path: Path) -> None:
    """datatools' are uint32, and hold the ids of added tokens, whose lowest byte may be zero."""
    with MDSWriter(tmp_path / "in", {"input_ids": "ndarray:uint32", "mask": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": tokens_of(1, 6), "mask": np.array([128000, 0, 0, 1, 1, 256], np.uint32)})
    pack([tmp_path / "in"], tmp_path / "packs", PackOptions(6, "concat"))
    filter_documents([tmp_path / "in"], tmp_path / "kept", FilterOptions(min_length={"": 1}))
    for step in ("packs", "kept"):
        (sample,) = MDSReader(tmp_path / step)
        assert sample["mask"].dtype == np.uint8 and sample["mask"].tolist() == [1, 0, 0, 1, 1, 1]
    assert survey(tmp_path / "in")[0].num_targets == 4


def test_unsuitable_inputs(tmp_path: Path) -> None:
    plain = write_documents(tmp_path / "plain", [30])
    masked = write_documents(tmp_path / "masked", [30], mask=True)
    with pytest.raises(UserError, match=r"masked has a column mask, other inputs have none"):
        pack([plain, masked], tmp_path / "packs", PackOptions(8, "concat"))
    made_by = [tmp_path / name for name in ("one", "two", "three")]
    for path in made_by:
        with MDSWriter(path, {"input_ids": "ndarray:uint32"}, tokenizer=path.name) as writer:
            writer.write({"input_ids": np.zeros(4, np.uint32)})
    with pytest.raises(UserError, match=r"/one and .*/two are of different tokenizers"):
        pack([plain, *made_by], tmp_path / "packs", PackOptions(2, "concat"))
    with MDSWriter(tmp_path / "text", {"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match="text: no column input_ids, only text"):
        pack([tmp_path / "text"], tmp_path / "packs", PackOptions(8, "concat"))
    write_documents(tmp_path / "empty", [])
    with pytest.raises(UserError, match=r"empty: no samples; leave it out"):
        pack([plain, tmp_path / "empty"], tmp_path / "packs", PackOptions(8, "concat"))
    with MDSWriter(tmp_path / "uneven", {"input_ids": "ndarray:uint32", "mask": "ndarray:uint8"}) as writer:
        writer.write({"input_ids": np.zeros(4, np.uint32), "mask": np.zeros(5, np.uint8)})
    with pytest.raises(
        UserError, match=r"uneven, shard .*, sample 0: mask must be integers \[4\].*found uint8 \[5\]"
    ):
        pack([tmp_path / "uneven"], tmp_path / "packs", PackOptions(2, "concat"))


@pytest.mark.parametrize("kind", ["ndarray", "ndarray:uint32", "ndarray:uint32:20"])
def test_tokens_of_every_type_that_holds_uint32_arrays(tmp_path: Path, kind: str) -> None:
    """Of a fixed shape, as mosaicml-streaming lets one write, they were refused."""
    with MDSWriter(tmp_path / "data", {"input_ids": kind, "domain": "str"}) as writer:
        for number in (1, 2, 3):
            writer.write({"input_ids": tokens_of(number, 20), "domain": "d"})
    report = pack([tmp_path / "data"], tmp_path / "packs", PackOptions(30, "concat", bos=1))
    assert report is not None and (report.tokens, report.added, report.packed) == (60, 3, 60)
    tokens = np.concatenate([sample["input_ids"] for sample in MDSReader(tmp_path / "packs")])
    expected = np.concatenate([[1, *tokens_of(number, 20)] for number in (1, 2, 3)])
    assert tokens.tolist() == expected[:60].tolist()


@pytest.mark.parametrize(("kind", "dtype"), [("ndarray", np.int64), ("ndarray:uint32:2,4", np.uint32)])
def test_arrays_that_are_no_tokens_are_refused(tmp_path: Path, kind: str, dtype: type) -> None:
    """They were packed as whatever the cast made of them."""
    with MDSWriter(tmp_path / "data", {"input_ids": kind}) as writer:
        writer.write(
            {"input_ids": np.full((2, 4), 2**31, dtype) if "," in kind else np.full(8, 2**33, dtype)}
        )
    with pytest.raises(UserError, match=rf"sample 0: input_ids must be uint32 \[S\], found {dtype.__name__}"):
        pack([tmp_path / "data"], tmp_path / "packs", PackOptions(4, "concat"))

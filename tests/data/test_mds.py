"""MDS data sets: round trips, random access, merging, and what happens when a file is damaged.

Equality with the package that defines the format is in tests/parity/test_mds_streaming.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prolong.data.mds import MDSReader, MDSWriter, Shard, merge_indexes, merge_tree
from megatron_prolong.data.mds import reader as reader_module
from megatron_prolong.data.mds import writer as writer_module
from megatron_prolong.data.mds.encodings import encoding
from megatron_prolong.errors import UserError

COLUMNS = {"input_ids": "ndarray:uint32", "length": "int", "domain": "str"}


def write(path: Path, lengths: list[int], first: int = 0, **options: object) -> None:
    with MDSWriter(path, COLUMNS, **options) as writer:  # type: ignore[arg-type]
        for number, length in enumerate(lengths, first):
            tokens = np.arange(length, dtype=np.uint32) + number
            writer.write({"input_ids": tokens, "length": length, "domain": f"d{number}"})


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=30),
    size_limit=st.integers(1, 5000),
    compression=st.sampled_from([None, "zstd", "gz:1"]),
)
def test_every_sample_comes_back_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], size_limit: int, compression: str | None
) -> None:
    path = tmp_path_factory.mktemp("mds") / "data"
    write(path, lengths, size_limit=size_limit, compression=compression, hashes=["xxh64"])
    reader = MDSReader(path)
    assert len(reader) == len(lengths)
    for number in [*range(len(lengths)), -1]:
        expected = number % len(lengths)
        np.testing.assert_array_equal(
            reader[number]["input_ids"], np.arange(lengths[expected], dtype=np.uint32) + expected
        )
        assert reader[number]["domain"] == f"d{expected}"
    shards = [reader.shard_of(number) for number in range(len(lengths))]
    assert [shard.first for shard in shards] == sorted(shard.first for shard in shards)
    assert all(shard.first <= number < shard.first + shard.num_samples for number, shard in enumerate(shards))
    with pytest.raises(IndexError):
        reader[len(lengths)]


def test_shards_larger_than_the_first_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is of 64 MiB, however large a shard may become."""
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 100)
    write(tmp_path / "data", [20, 5, 300, 1, 70], size_limit=5000)
    reader = MDSReader(tmp_path / "data")
    assert len(reader.shards) == 1
    for number, (length, sample) in enumerate(zip([20, 5, 300, 1, 70], reader, strict=True)):
        assert sample["input_ids"].tolist() == [*range(number, number + length)]


def test_a_shard_ends_before_the_sample_that_would_exceed_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", [20, 20], size_limit=999)
    (shard,) = MDSReader(tmp_path / "data").shards
    for less in (0, 1):
        write(tmp_path / f"less{less}", [20, 20], size_limit=shard.raw.num_bytes - less)
        assert len(MDSReader(tmp_path / f"less{less}").shards) == 1 + less
    monkeypatch.setattr(writer_module, "_MAX_SHARD_BYTES", shard.raw.num_bytes)
    write(tmp_path / "most", [20, 20], size_limit=shard.raw.num_bytes)
    with pytest.raises(UserError, match=r"sample 1: \d+ bytes do not fit into the MDS format's 4 GiB shards"):
        write(tmp_path / "more", [20, 60], size_limit=shard.raw.num_bytes)
    with pytest.raises(UserError, match=rf"shard size limit {shard.raw.num_bytes + 1} is not"):
        write(tmp_path / "more", [20], size_limit=shard.raw.num_bytes + 1)
    with pytest.raises(UserError, match="shard size limit 0 is not"):
        write(tmp_path / "more", [20], size_limit=0)


def test_a_data_set_without_samples_has_no_shards(tmp_path: Path) -> None:
    """As of a filter's task whose documents are all dropped."""
    write(tmp_path / "data", [])
    assert MDSReader(tmp_path / "data").shards == [] and list(MDSReader(tmp_path / "data")) == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["index.json"]


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "data", [1000])
    tokens = MDSReader(tmp_path / "data")[0]["input_ids"]
    assert not tokens.flags.owndata and not tokens.flags.writeable


def test_a_reader_of_many_shards_holds_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map keeps its file open, and ProLong's data has thousands of shards."""
    monkeypatch.setattr(reader_module, "allow_open_files", lambda: 4096)
    write(tmp_path / "data", [50] * 200, size_limit=1)
    reader = MDSReader(tmp_path / "data")
    assert len(reader.shards) == 200
    before = len(list(Path("/proc/self/fd").iterdir()))
    arrays = [reader[number]["input_ids"].copy() for number in range(200)]
    kept = reader[7]["input_ids"]
    assert [int(reader[number]["input_ids"][0]) for number in reversed(range(200))] == [*reversed(range(200))]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 65
    np.testing.assert_array_equal(kept, arrays[7])  # a view outlives its map's place in the reader


def test_shards_stay_open_where_the_administrator_allows_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every opening is a question to the file server, of every rank. It is the only one."""
    write(tmp_path / "data", [50] * 200, size_limit=1)
    monkeypatch.setattr(reader_module, "allow_open_files", lambda: 65536)
    asked: list[str] = []
    open_path, reader = Path.open, MDSReader(tmp_path / "data")
    with monkeypatch.context() as watched:
        watched.setattr(Path, "stat", lambda path, **_: asked.append(f"stat {path.name}"))
        watched.setattr(Path, "open", lambda path, *how: asked.append(path.name) or open_path(path, *how))
        for _ in range(3):
            assert [int(sample["length"]) for sample in reader] == [50] * 200
    assert asked == [shard.raw.basename for shard in reader.shards]


def test_many_data_sets_need_more_open_files_than_a_shell_allows(tmp_path: Path) -> None:
    """A mixture of twenty domains ended in the middle of a run with "Too many open files"."""
    for name in "abc":
        write(tmp_path / name, [50] * 60, size_limit=1)
    program = (
        "import resource\n"
        "from megatron_prolong.data.mds import MDSReader\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))\n"
        f"readers = [MDSReader({str(tmp_path)!r} + '/' + name) for name in 'abc']\n"
        "print(sum(len(sample['input_ids']) for reader in readers for sample in reader))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "9000\n", done.stderr


@pytest.mark.parametrize("kind", ["pkl", "str_decimal", "of_tomorrow"])
def test_columns_can_be_chosen_and_others_are_passed_over(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "data", [3, 4])
    index = tmp_path / "data" / "index.json"
    index.write_text(index.read_text().replace('"ndarray:uint32"', f'"{kind}"'))
    assert MDSReader(tmp_path / "data", columns=["length", "text"])[1] == {"length": 4}
    with pytest.raises(UserError, match=rf"data, column input_ids: .*{kind}"):
        MDSReader(tmp_path / "data", columns=["length", "input_ids"])


def test_a_column_of_unknown_type_is_read_as_the_bytes_that_are_stored(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "data", {"a": "ndarray:uint8:3", "b": "str"}) as writer:
        writer.write({"a": np.array([7, 8, 9], np.uint8), "b": "x"})
    index = tmp_path / "data" / "index.json"
    index.write_text(
        index.read_text().replace('"ndarray:uint8:3"', '"of_tomorrow"').replace('"str"', '"pkl"')
    )
    assert list(MDSReader(tmp_path / "data")) == [{"a": b"\x07\x08\t", "b": b"x"}]
    assert MDSReader(tmp_path / "data").columns == {"a": "of_tomorrow", "b": "pkl"}


def test_merge_keeps_order_and_reads_nested_directories(tmp_path: Path) -> None:
    write(tmp_path / "all" / "b" / "x", [3], first=0)
    write(tmp_path / "all" / "a", [4, 5], first=1, compression="zstd")
    assert merge_indexes([tmp_path / "all" / "b" / "x", tmp_path / "all" / "a"], tmp_path / "all") == 3
    assert [each["domain"] for each in MDSReader(tmp_path / "all")] == ["d0", "d1", "d2"]
    write(tmp_path / "all" / "c.tmp-prolong-host-17", [6], first=3)  # a process that was killed left it
    # by path this time, and without counting the merged index itself
    assert merge_tree(tmp_path / "all") == merge_tree(tmp_path / "all") == 3
    assert [each["domain"] for each in MDSReader(tmp_path / "all")] == ["d1", "d2", "d0"]


def test_merge_takes_any_name_of_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and relative names, and a job's directory that was copied under its unfinished name."""
    write(tmp_path / "all.partial" / "a", [3])
    (tmp_path / "link").symlink_to("all.partial")
    monkeypatch.chdir(tmp_path)
    for inside, out in (("link/a", "all.partial"), ("all.partial/a", "link")):
        assert merge_indexes([Path(inside)], Path(out)) == 1
    assert merge_tree(Path("all.partial")) == 1


def test_columns_in_another_order_are_not_mixed_up(tmp_path: Path) -> None:
    """Those of the second shard were read under each other's names."""
    with MDSWriter(tmp_path / "data", {"input_ids": "ndarray:uint32", "labels": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.full(4, 1, np.uint32), "labels": np.full(4, 2, np.uint32)})
    index = tmp_path / "data" / "index.json"
    content = json.loads(index.read_text())
    (shard,) = content["shards"]
    content["shards"].append(shard | {"column_names": shard["column_names"][::-1]})
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has the columns labels \(ndarray:uint32\), input_ids"):
        MDSReader(tmp_path / "data")


def test_merge_refuses_what_would_lose_samples(tmp_path: Path) -> None:
    """The first lost those of the directory itself, with its index; the second counted half a job."""
    write(tmp_path / "own", [3, 4])
    for nothing in (tmp_path / "own", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no data set in its subdirectories"):
            merge_tree(nothing)
    write(tmp_path / "own" / "sub", [5])
    with pytest.raises(UserError, match=r"own holds shards itself"):
        merge_tree(tmp_path / "own")
    assert len(MDSReader(tmp_path / "own")) == 2
    write(tmp_path / "jobs" / "a", [3])
    write(tmp_path / "jobs" / "b.partial" / "00000", [4])
    with pytest.raises(UserError, match=r"b\.partial/00000 is of a job that is not finished"):
        merge_tree(tmp_path / "jobs")
    write(tmp_path / "all" / "a", [3])
    (tmp_path / "all" / "first").symlink_to("a")
    (tmp_path / "all" / "shard").symlink_to(tmp_path / "own" / "index.json")
    assert merge_tree(tmp_path / "all") == 1
    (tmp_path / "all" / "b").symlink_to(tmp_path / "own")
    with pytest.raises(UserError, match=r"all/b leads to data that does not lie below .*all; move it there"):
        merge_tree(tmp_path / "all")


def test_merge_carries_the_tokenizer_and_refuses_another(tmp_path: Path) -> None:
    write(tmp_path / "a", [3], tokenizer="one")
    write(tmp_path / "b", [3])  # as other writers of the format leave it, and goes with any
    write(tmp_path / "c", [3], tokenizer="two")
    for known, unknown in (("a", "b"), ("b", "a")):
        merge_indexes([tmp_path / known, tmp_path / unknown], tmp_path)
        assert MDSReader(tmp_path).tokenizer == "one"
    with pytest.raises(
        UserError, match=r"/a and .*/c are of different tokenizers \(fingerprints one and two\)"
    ):
        merge_tree(tmp_path)
    assert len(MDSReader(tmp_path)) == 2, "the index is as it was"
    merge_indexes([tmp_path / "b"], tmp_path)
    assert MDSReader(tmp_path).tokenizer is None


def test_merge_refuses_other_columns_and_leaves_the_old_index(tmp_path: Path) -> None:
    write(tmp_path / "a", [3])
    with MDSWriter(tmp_path / "b", {"text": "str"}) as writer:
        writer.write({"text": "x"})
    with pytest.raises(UserError, match=r"b/shard.00000.mds has the columns text \(str\)"):
        merge_indexes([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert not (tmp_path / "index.json").exists()
    merge_indexes([tmp_path / "a"], tmp_path)
    with pytest.raises(UserError, match=r"b/shard.00000.mds has the columns text \(str\)"):
        merge_indexes([tmp_path / "a", tmp_path / "b"], tmp_path)
    assert len(MDSReader(tmp_path)) == 1
    with pytest.raises(UserError, match="does not lie below"):
        merge_indexes([tmp_path / "a"], tmp_path / "b")


@given(st.lists(st.integers(1, 70_000), min_size=1, max_size=6), st.booleans())
@settings(max_examples=30)
def test_lengths_without_reading(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], fixed: bool
) -> None:
    """Whatever lies in front of the column, and across the sizes at which the stored length grows."""
    path = tmp_path_factory.mktemp("lengths") / "data"
    columns = {"a": "int16" if fixed else "str", "b": "ndarray:uint32", "c": "str", "d": "ndarray:uint8"}
    with MDSWriter(path, columns, size_limit=100_000) as writer:
        for number, length in enumerate(lengths):
            first = number if fixed else "é" * number
            arrays = {"b": np.zeros(length, np.uint32), "d": np.zeros(2 * length, np.uint8)}
            writer.write({"a": first, "c": "x" * length, **arrays})
    reader = MDSReader(path)
    for column, factor in {"b": 1, "d": 2}.items():
        found = [reader.array_lengths(column, number) for number in range(len(reader.shards))]
        assert np.concatenate(found).tolist() == [factor * length for length in lengths]


def test_arrays_of_more_axes_have_no_length(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "data", {"a": "ndarray:uint8"}) as writer:
        writer.write({"a": np.zeros((2, 3), np.uint8)})
    with pytest.raises(UserError, match=r"shard\.00000\.mds: column a has arrays of more than one axis"):
        MDSReader(tmp_path / "data").array_lengths("a", 0)


def test_nothing_appears_under_the_name_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), MDSWriter(tmp_path / "data", COLUMNS, size_limit=100) as writer:
        for _ in range(10):
            writer.write({"input_ids": np.zeros(100, np.uint32), "length": 100, "domain": "x"})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_existing_data_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^\. exists already"):  # empty, but it has no name to write beside
        MDSWriter(".", COLUMNS)
    write(tmp_path / "data", [1])
    with pytest.raises(UserError, match="exists already"):
        MDSWriter(tmp_path / "data", COLUMNS)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", [1])
    assert len(MDSReader(tmp_path / "empty")) == 1


@pytest.mark.parametrize("target", ["gone", "empty"])
def test_a_link_is_refused_before_the_work(target: str, tmp_path: Path) -> None:
    """At the end nothing could have been renamed to it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"link is a link; name the place that it leads to"):
        MDSWriter(tmp_path / "link", COLUMNS)


def test_an_address_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib makes a directory `s3:` of it, where a job's hours of results lay."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^s3:/bucket/data: is the address of a server; .* name a directory"):
        MDSWriter("s3://bucket/data", COLUMNS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"length": "3"}, r"sample 0, column length \(int\): expected one int64, found str"),
        ({"length": 2**63}, r"column length \(int\): 9223372036854775808 does not fit into int64"),
        ({"length": 1.5}, r"column length \(int\): expected one int64, found float"),
        ({"domain": 7}, r"column domain \(str\): expected str, found int"),
        (
            {"input_ids": np.zeros(3, np.int64)},
            r"column input_ids .*expected an array of uint32, found int64",
        ),
        ({"input_ids": np.zeros(0, np.uint32)}, r"column input_ids .*no arrays without elements"),
        ({"extra": 1}, r"sample 0: has the columns \['domain', 'extra', 'input_ids', 'length'\]"),
    ],
)
def test_unfitting_values_name_sample_and_column(sample: dict, message: str, tmp_path: Path) -> None:
    good = {"input_ids": np.zeros(3, np.uint32), "length": 3, "domain": "x"}
    with pytest.raises(UserError, match=message), MDSWriter(tmp_path / "data", COLUMNS) as writer:
        writer.write(good | sample)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("uint8", 0, 255),
        ("int16", -(2**15), 2**15 - 1),
        ("uint64", 0, 2**64 - 1),
        ("int", -(2**63), 2**63 - 1),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kind: str, least: int, most: int) -> None:
    coder = encoding(kind)
    for value in (least, 7, most):
        assert coder.decode(b"".join(coder.encode(value)), 0, coder.size or 0) == value
    for value in (least - 1, most + 1, 1.0, np.ones(1, np.int8), "7", None):
        with pytest.raises((OverflowError, TypeError)):
            coder.encode(value)


@pytest.mark.parametrize("value", [1.5, -7, float("inf"), float("nan")])
def test_whatever_is_a_number_fits_into_floats(value: float) -> None:
    coder = encoding("float16")
    np.testing.assert_equal(coder.decode(b"".join(coder.encode(value)), 0, 2), np.float16(value))


@pytest.mark.parametrize(
    ("dtype", "code"),
    {
        **{"u1": 8, "i1": 9, "u2": 16, "i2": 17, "f2": 18, "u4": 32, "i4": 33, "f4": 34},
        **{"u8": 64, "i8": 65, "f8": 66},
    }.items(),
)
@pytest.mark.parametrize("shape", [(3,), (255,), (256,), (2, 300), (70_000, 1)])
def test_arrays_say_what_they_are(dtype: str, code: int, shape: tuple[int, ...]) -> None:
    """By the codes of mosaicml-streaming, and whatever the order of their bytes in memory."""
    coder = encoding("ndarray")
    for order in "<>":
        array = (np.arange(np.prod(shape)) % 127).astype(order + dtype).reshape(shape)
        stored = b"".join(coder.encode(array.T if order == ">" else array))
        assert stored[0] == code
        found = coder.decode(stored, 0, len(stored))
        assert found.dtype == np.dtype("<" + dtype)
        np.testing.assert_array_equal(found, array.T if order == ">" else array)


def test_arrays_that_the_format_or_the_column_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError, match="the format has no arrays of bool"):
        encoding("ndarray").encode(np.zeros(3, bool))
    for kind, array in {"ndarray": np.array(1), "ndarray:int8": np.zeros((2, 0), np.int8)}.items():
        with pytest.raises(ValueError, match="no arrays without elements and no arrays without axes"):
            encoding(kind).encode(array)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), found \(3, 2\)"):
        encoding("ndarray:int8:2,3").encode(np.zeros((3, 2), np.int8))
    coder = encoding("ndarray:int16")
    stored = b"".join(coder.encode(np.zeros(5, np.int16)))
    assert stored[:2] == b"\x04\x05"
    for count in (4, 6):
        with pytest.raises(ValueError, match=rf"an array of int16 \[{count}\] does not fill its 12 bytes"):
            coder.decode(stored[:1] + bytes([count]) + stored[2:] + bytes(9), 0, len(stored))
    assert encoding("json").encode({"a": 1}) == [b'{"a": 1}']
    assert encoding("json").encode(np.array([1, 2])) == [b"[1, 2]"]


@pytest.mark.parametrize("kind", ["jpeg", "pkl", "ndarray:complex64", "ndarray:uint8:a", "int:3", "int32:3"])
def test_unknown_column_types_are_refused(kind: str) -> None:
    with pytest.raises(UserError):
        encoding(kind)


# Damage. Every case names the file, and the sample where there is one.


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data", [50] * 20, size_limit=2000, hashes=["sha1"])
    return tmp_path / "data"


def test_truncated_shard(data: Path) -> None:
    shard = data / "shard.00001.mds"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 5)
    reader = MDSReader(data)
    assert reader[0]["length"] == 50
    with pytest.raises(UserError, match=r"shard.00001.mds: truncated, \d+ bytes where index.json says \d+"):
        list(reader)
    with pytest.raises(UserError, match=r"shard.00001.mds: truncated"):
        reader.verify(1)


def test_a_shard_with_more_than_the_index_says(data: Path) -> None:
    """Else the samples that the index does not count would be missing in silence."""
    index = json.loads((data / "index.json").read_text())
    index["shards"][0]["samples"] -= 1
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"shard.00000.mds holds \d samples, index.json says \d"):
        MDSReader(data)[0]
    with (data / "shard.00001.mds").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"shard.00001.mds: too long, \d+ bytes where index.json says \d+"):
        MDSReader(data)[index["shards"][0]["samples"]]


def test_wrong_hash(data: Path) -> None:
    flip(data / "shard.00001.mds", -1)
    assert len(list(MDSReader(data))) == 20  # unnoticed without a check
    with pytest.raises(UserError, match=r"shard.00001.mds: its sha1 is \w+, index.json says \w+"):
        MDSReader(data).verify(1)


@pytest.mark.parametrize("name", ["md17", "shake_128"])
def test_unknown_hash(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"unknown hash '{name}'"):
        write(tmp_path / "data", [50], hashes=[name])


def test_missing_shard(data: Path) -> None:
    (data / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match=r"shard.00000.mds: this shard is missing"):
        MDSReader(data)[0]


def test_missing_index_names_what_is_there(data: Path) -> None:
    with pytest.raises(UserError, match=r"no index.json, but 1 subdirectories have one \(data\).*data merge"):
        MDSReader(data.parent)
    (data / "index.json").unlink()
    with pytest.raises(UserError, match=r"not an MDS data set, there is no index\.json"):
        MDSReader(data)
    with pytest.raises(UserError, match="no such directory"):
        MDSReader(data / "nowhere")
    with pytest.raises(UserError, match=r"00000\.mds: not an MDS data set"):
        MDSReader(data / "shard.00000.mds")
    with pytest.raises(UserError, match="are memory-mapped, so copy it to a disk first"):
        MDSReader("s3://bucket/data")


def test_what_a_job_has_not_finished_is_no_data_set(data: Path) -> None:
    """Its parts were proposed, one of them or all that are there so far: documents would have been missing."""
    unfinished = data.parent / "packs.partial"
    unfinished.mkdir()
    data.rename(unfinished / "00000")
    for name in ("packs", "packs.partial"):
        with pytest.raises(
            UserError,
            match=rf"{name}: .*/packs\.partial is of a job that is not finished; run .*, for .*/packs$",
        ):
            MDSReader(data.parent / name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"shards": [3]}',
        '{"shards": [{}]}',
        '{"shards": 3}',
        "\xff",
        '{"shards": [], "tokenizer": ["a"]}',
        '{"shards": [], "tokenizer": 7}',
    ],
)
def test_index_that_is_none(data: Path, text: str) -> None:
    (data / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"index\.json"):
        MDSReader(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"raw_data": {"basename": "../secret.mds", "bytes": 8}}, "lies outside the data set"),
        ({"raw_data": {"basename": "/secret.mds", "bytes": 8}}, "lies outside the data set"),
        ({"format": "json"}, "format 'json' version 2, expected 'mds' version 2"),
        ({"version": 3}, "format 'mds' version 3, expected"),
        ({"column_encodings": ["str"]}, "argument 2 is shorter than argument 1"),
        ({"column_names": [1, None], "column_encodings": ["str", "str"]}, "expected names and encodings"),
    ],
)
def test_index_that_cannot_be_followed(data: Path, change: dict[str, object], said: str) -> None:
    index = json.loads((data / "index.json").read_text())
    index["shards"][0] |= change
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index\.json.*{said}"):
        MDSReader(data)


def test_invalid_utf8_names_sample_and_column(data: Path) -> None:
    shard = data / "shard.00001.mds"
    content = shard.read_bytes()
    at = content.index(b"d10")
    shard.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(
        UserError, match=r"shard.00001.mds, sample \d \(number 10 of .*\), column domain: .*utf-8"
    ):
        list(MDSReader(data))


@pytest.mark.parametrize(
    ("kind", "more", "later"),
    [("str", 100, 100), ("str", -2, 0), ("ndarray:uint32", -2, 0), ("ndarray:uint32", 4, 0)],
)
def test_a_sample_of_another_size_is_noticed_without_hashes(
    tmp_path: Path, kind: str, more: int, later: int
) -> None:
    """Though what there is of it may decode: the end of a text was missing, or the length of an array another."""
    with MDSWriter(tmp_path / "data", {"a": kind}, hashes=[]) as writer:
        writer.write({"a": "some text" if kind == "str" else np.zeros(9, np.uint32)})
    shard = tmp_path / "data" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    begin, end = np.frombuffer(content, "<u4", 2, 4).tolist()
    size = int.from_bytes(content[begin : begin + 4], "little")
    content[begin : begin + 4] = (size + more).to_bytes(4, "little")
    content[8:12] = (end + later).to_bytes(4, "little")
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard\.00000\.mds, sample 0 .*: columns end at byte"):
        MDSReader(tmp_path / "data")[0]
    if kind != "str":
        with pytest.raises(UserError, match=r"shard\.00000\.mds, sample 0 .*: columns end at byte"):
            MDSReader(tmp_path / "data").array_lengths("a", 0)


def test_garbage_never_crashes_the_reader(data: Path) -> None:
    """Any single byte changed: the samples decode, to something, or a UserError names the shard."""
    shard = data / "shard.00000.mds"
    content = shard.read_bytes()
    for at in range(0, len(content), 3):
        shard.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            for number in range(MDSReader(data).shards[0].num_samples):
                MDSReader(data)[number]
            MDSReader(data).array_lengths("input_ids", 0)
        except UserError as error:
            assert "shard.00000.mds" in str(error)


def test_compressed_shards_are_the_same_every_time_and_of_the_level_that_is_asked_for(tmp_path: Path) -> None:
    """And zstd's say how large they are unpacked, which mosaicml-streaming asks for."""
    size: dict[str, int] = {}
    for level in ("zstd:1", "zstd:19", "gz:1", "gz:9", "bz2:1", "bz2:9"):
        write(tmp_path / level, [30_000] * 2, compression=level)
        (file,) = (tmp_path / level).glob(f"shard.00000.mds.{level.partition(':')[0]}")
        size[level] = file.stat().st_size
        if level.startswith("zstd"):
            raw = MDSReader(tmp_path / level).shards[0].raw.num_bytes
            assert zstandard.frame_content_size(file.read_bytes()) == raw
        MDSReader(tmp_path / level).verify(0)
    for low, high in (("zstd:1", "zstd:19"), ("gz:1", "gz:9"), ("bz2:1", "bz2:9")):
        assert abs(size[high] - size[low]) > 8, "the name of the level is in the file, too"
    gz = next((tmp_path / "gz:9").glob("*.gz")).read_bytes()
    assert gz[3:8] == bytes(5), "neither a name nor a time"
    with pytest.raises(UserError, match="compression 'zstd:high' is not supported"):
        write(tmp_path / "other", [3], compression="zstd:high")


def test_damaged_compressed_shard(tmp_path: Path) -> None:
    for compression in ("zstd", "gz", "bz2"):
        path = tmp_path / compression
        write(path, [500] * 5, compression=compression)
        file = next(path.glob("shard.00000.mds.*"))
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        with pytest.raises(UserError, match=rf"shard.00000.mds.{compression}"):
            MDSReader(path)[0]
        assert [each.name for each in path.iterdir() if "tmp" in each.name] == []
        file.write_bytes(content[:-5])
        with pytest.raises(UserError, match=rf"shard.00000.mds.{compression}: truncated"):
            MDSReader(path)[0]
        file.unlink()
        with pytest.raises(UserError, match=rf"shard.00000.mds.{compression}: this shard is missing"):
            MDSReader(path)[0]


def test_a_compression_that_is_not_read_is_told_with_the_file(tmp_path: Path) -> None:
    write(tmp_path, [500], compression="gz")
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace('"gz"', '"snappy"'))
    with pytest.raises(
        UserError, match=r"shard.00000.mds.gz: compression 'snappy' is not supported; known: zstd"
    ):
        MDSReader(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bytes": 7}, r"shard.00000.mds.zstd unpacks to \d+ bytes, index.json says 7"),
        ({"hashes": {"xxh64": "0123"}}, r"shard.00000.mds: its xxh64 is \w+, index.json says 0123"),
    ],
)
def test_a_compressed_shard_of_another_content(tmp_path: Path, change: dict, said: str) -> None:
    write(tmp_path, [500] * 5, compression="zstd")
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["raw_data"] |= change
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=said):
        MDSReader(tmp_path)[0]
    assert not (tmp_path / "shard.00000.mds").exists()


def test_compressed_shards_are_unpacked_beside_or_on_a_read_only_disk_elsewhere(small_disk: Path) -> None:
    write(small_disk / "data", [500] * 5, compression="zstd")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert MDSReader(small_disk / "data")[4]["length"] == 500
    assert not (small_disk / "data" / "shard.00000.mds").exists()
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert MDSReader(small_disk / "data")[4]["length"] == 500
    assert (small_disk / "data" / "shard.00000.mds").exists()


@pytest.mark.parametrize(("unnamed", "open_files"), [(2, 1 << 16), (64, 2 * 64)])
def test_shards_unpacked_elsewhere_take_a_bounded_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: int, open_files: int
) -> None:
    """All of them stayed: reading 100 GB from a read-only place filled /tmp, and then there were no open files."""
    monkeypatch.setattr(reader_module, "_MAX_UNNAMED", unnamed)
    monkeypatch.setattr(reader_module, "allow_open_files", lambda: open_files)
    unpack, unpacked = reader_module._unpack, []
    monkeypatch.setattr(
        reader_module, "_unpack", lambda shard: unpacked.append(shard.raw.basename) or unpack(shard)
    )
    write(tmp_path / "data", [50] * 6, size_limit=1, compression="zstd")
    with monkeypatch.context() as read_only:
        read_only.setattr(reader_module, "temporary_name", lambda path: path / "read-only")
        reader = MDSReader(tmp_path / "data")
        open_before = len(list(Path("/proc/self/fd").iterdir()))
        for number in (0, 1, 2, 3, 4, 5, 4, 1, 5):
            assert reader[number]["domain"] == f"d{number}"
        assert len(list(Path("/proc/self/fd").iterdir())) == open_before + 2
        assert unpacked == [f"shard.{number:05}.mds" for number in (0, 1, 2, 3, 4, 5, 1)], "the oldest went"
    reader = MDSReader(tmp_path / "data")
    assert len(list(reader)) == 6  # unpacked beside: these take no room that they did not take anyway
    assert len(reader._maps) == min(6, open_files // 64)


def test_half_a_shard_beside_the_compressed_one_is_unpacked_again(tmp_path: Path) -> None:
    """As a killed process of mosaicml-streaming leaves it."""
    write(tmp_path, [500], compression="zstd")
    (tmp_path / "shard.00000.mds").write_bytes(b"half")
    assert MDSReader(tmp_path)[0]["length"] == 500


def test_processes_that_want_the_same_compressed_shard_unpack_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank reads the same global batch: each would write all shards."""
    write(tmp_path / "data", [500] * 5, compression="zstd")
    unpack, unpacked, waiting = reader_module._unpack, [], threading.Barrier(4)

    def slowly(shard: Shard) -> IO[bytes]:
        unpacked.append(shard.raw.basename)
        time.sleep(0.1)
        return unpack(shard)

    def rank() -> int:
        reader = MDSReader(tmp_path / "data")
        waiting.wait(60)
        return int(reader[4]["length"])

    monkeypatch.setattr(reader_module, "_unpack", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert [each.result() for each in [pool.submit(rank) for _ in range(4)]] == [500] * 4
    assert unpacked == ["shard.00000.mds"]


def test_a_full_disk_is_not_a_damaged_shard(small_disk: Path) -> None:
    with MDSWriter(small_disk / "data", {"input_ids": "ndarray:uint32"}, compression="zstd") as writer:
        writer.write({"input_ids": np.zeros(1 << 20, np.uint32)})
    with pytest.raises(
        UserError, match=r"shard.00000.mds: the disk is full; shard.00000.mds.zstd takes 4,194,\d+ bytes"
    ):
        MDSReader(small_disk / "data")[0]
    assert not list((small_disk / "data").glob("*.tmp-*"))


def test_a_full_temporary_directory_is_named(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message was about the data set's own disk, and there was none where only the last bytes found no room."""
    monkeypatch.setattr(reader_module, "temporary_name", lambda path: path / "read-only")
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    write(tmp_path / "data", [5000], compression="zstd")
    disk, unpacked = os.statvfs(small_disk), MDSReader(tmp_path / "data").shards[0].raw.num_bytes
    (small_disk / "filler").write_bytes(bytes(disk.f_bsize * (disk.f_bavail - unpacked // disk.f_bsize)))
    with pytest.raises(UserError, match=rf"^{small_disk}: the disk is full; shard.00000.mds.zstd takes"):
        MDSReader(tmp_path / "data")[0]


def test_full_disk(small_disk: Path) -> None:
    with pytest.raises(UserError, match=r"disk/data: the disk is full.*run the same command again"):
        write(small_disk / "data", [10_000] * 100, size_limit=200_000)
    assert list(small_disk.iterdir()) == []


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)

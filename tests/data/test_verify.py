import errno
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from documents import write_documents
from packs import COLUMNS, numbered_packs, write_packs
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.mds import reader as reader_module
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.data.verify import verify
from megatron_prolong.errors import UserError


def data_set(root: Path, *, hashes: tuple[str, ...] = ("xxh64",), compression: str | None = None) -> Path:
    """Eight shards of one sample each."""
    return write_packs(
        root / "data", numbered_packs(8), size_limit=300, hashes=hashes, compression=compression
    )


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_sound_data_set_has_no_problems(tmp_path: Path) -> None:
    verdict = verify(data_set(tmp_path), vocab_size=100)
    assert (verdict.num_shards, verdict.num_samples, verdict.num_unhashed) == (8, 8, 0)
    assert verdict.problems == []


def test_every_damaged_shard_is_found(tmp_path: Path) -> None:
    directory = data_set(tmp_path)
    shard = [directory / f"shard.{number:05}.mds" for number in range(8)]
    flip(shard[1], -1)
    shard[3].write_bytes(shard[3].read_bytes()[:-5])
    shard[4].unlink()
    shutil.copy(shard[5], shard[6])
    problems = verify(directory).problems
    assert len(problems) == 4
    for problem, number in zip(problems, (1, 3, 4, 6), strict=True):
        assert f"shard.{number:05}.mds" in problem


def test_a_shard_that_the_disk_does_not_give_is_one_of_the_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ended the search, in a traceback without its name."""
    directory = data_set(tmp_path)
    flip(directory / "shard.00005.mds", -1)
    parts = reader_module._parts

    def on_a_bad_disk(path: Path) -> Iterator[memoryview]:
        if path.name == "shard.00002.mds":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return parts(path)

    monkeypatch.setattr(reader_module, "_parts", on_a_bad_disk)
    bad, flipped = verify(directory).problems
    assert bad == f"{directory}/shard.00002.mds: cannot be read (Input/output error)"
    assert "shard.00005.mds" in flipped


def test_no_room_to_unpack_is_no_damage(small_disk: Path) -> None:
    """Every shard that no longer fitted was called damaged."""
    with MDSWriter(
        small_disk / "data", {"input_ids": "ndarray:uint32"}, size_limit=1 << 19, compression="zstd"
    ) as writer:
        for _ in range(4):
            writer.write({"input_ids": np.zeros(100_000, np.uint32)})
    with pytest.raises(
        UserError, match=r"^\S+shard.0000\d.mds: the disk is full; .* takes [\d,]+ bytes unpacked"
    ):
        verify(small_disk / "data")


@pytest.mark.parametrize("position", [0, 4, 40, -9])
def test_any_flipped_bit_is_found_by_the_hash(tmp_path: Path, position: int) -> None:
    directory = data_set(tmp_path)
    flip(directory / "shard.00002.mds", position)
    (problem,) = verify(directory).problems
    assert "shard.00002.mds" in problem


def test_a_flipped_byte_in_packs_of_ours_is_found(tmp_path: Path) -> None:
    """What the steps write has hashes, so that a changed token is noticed wherever it lies."""
    pack([write_documents(tmp_path / "documents", [50] * 10)], tmp_path / "packs", PackOptions(40, "concat"))
    (shard,) = (tmp_path / "packs").rglob("*.mds")
    assert verify(tmp_path / "packs").num_unhashed == 0
    flip(shard, shard.read_bytes().index(np.array([2007], "<u4").tobytes()))
    result = CliRunner().invoke(app, ["data", "verify", str(tmp_path / "packs")])
    assert isinstance(result.exception, UserError)  # which the program turns into exit code 2
    assert f"{shard}: its xxh64 is" in str(result.exception)


def test_without_hashes_damage_to_the_structure_is_found_and_the_rest_is_admitted(tmp_path: Path) -> None:
    directory = data_set(tmp_path, hashes=())
    flip(directory / "shard.00002.mds", 4)
    verdict = verify(directory)
    assert verdict.num_unhashed == 8
    (problem,) = verdict.problems
    assert "shard.00002.mds" in problem


def test_a_compressed_shard_unpacked_earlier_is_checked_as_well(tmp_path: Path) -> None:
    directory = data_set(tmp_path, compression="zstd")
    assert verify(directory).problems == []
    list(MDSReader(directory))
    flip(directory / "shard.00005.mds", -12)  # in the last token: only the hash can tell
    (problem,) = verify(directory).problems
    assert "shard.00005.mds" in problem
    flip(directory / "shard.00006.mds.zstd", 20)
    assert len(verify(directory).problems) == 2


@pytest.mark.parametrize("size_limit", [1, 1 << 20])
def test_wrong_contents_are_found_in_sound_files(tmp_path: Path, size_limit: int) -> None:
    """Listed one by one, but no more than three of a shard."""
    good = {
        "input_ids": np.arange(4, dtype=np.uint32),
        "indices": np.array([[0, 4]], np.uint32),
        "mask": np.ones(4, np.uint8),
        "domain": "d",
        "length": 4,
    }
    wrong = {
        "indices end at 3": {"indices": np.array([[0, 3]], np.uint32)},
        "mask must be integers [4]": {"mask": np.ones(3, np.uint8)},
        "span [1, 4) of indices": {"indices": np.array([[1, 4]], np.uint32)},
        "length 5, but 4 tokens": {"length": 5},
        "token 50 at position 3": {"input_ids": np.array([1, 2, 3, 50], np.uint32)},
    }
    with MDSWriter(tmp_path / "d", COLUMNS | {"mask": "ndarray:uint8"}, size_limit=size_limit) as writer:
        writer.write(good)
        for change in wrong.values():
            writer.write(good | change)
    expected = [f"sample {number}: {said}" for number, said in enumerate(wrong, start=1)]
    if size_limit > 1:
        expected[3:] = ["shard.00000.mds: and 2 more samples like these"]
    problems = verify(tmp_path / "d", vocab_size=50).problems
    assert len(problems) == len(expected)
    for problem, said in zip(problems, expected, strict=True):
        assert said in problem
    assert not any("token 50" in problem for problem in verify(tmp_path / "d").problems)


def test_shards_the_index_does_not_know_are_found(tmp_path: Path) -> None:
    directory = data_set(tmp_path)
    index = json.loads((directory / "index.json").read_text())
    index["shards"].pop(3)
    (directory / "index.json").write_text(json.dumps(index))
    (directory / "shard.00001.mds.tmp-prolong-host-17").write_bytes(b"a process was killed while unpacking")
    downloads = directory / ".cache/huggingface/download"  # as `hf download --local-dir` leaves it
    downloads.mkdir(parents=True)
    for name in ("shard.00001.mds.metadata", "shard.00001.mds.zstd.metadata", "shard.00001.mds.lock"):
        (downloads / name).touch()
    (directory / "shard.00009.mds.zstd").touch()
    for number, problem in zip((3, 9), verify(directory).problems, strict=True):
        assert f"shard.0000{number}.mds" in problem and "not named by" in problem


def test_text_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    with MDSWriter(tmp_path / "text", {"text": "str"}) as writer:
        writer.write({"text": "x"})
    assert verify(tmp_path / "text").problems == []


def test_without_an_index_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no index\.json"):
        verify(tmp_path)


def test_an_index_without_samples_is_no_sound_data_set(tmp_path: Path) -> None:
    """A copy may stop at the first file. Training refuses it as well."""
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')
    assert verify(tmp_path).problems == [f"{tmp_path}: it is empty: its index.json lists no samples"]


@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_a_shard_is_never_in_memory_as_a_whole(tmp_path: Path, compression: str | None) -> None:
    with MDSWriter(tmp_path / "data", {"input_ids": "ndarray:uint32"}, compression=compression) as writer:
        for number in range(32):
            writer.write({"input_ids": np.full(1 << 18, number, np.uint32)})
    if compression:
        assert len(MDSReader(tmp_path / "data")[0]["input_ids"]) == 1 << 18, "unpacked once, beside it"
    shard = (tmp_path / "data" / "shard.00000.mds").stat().st_size
    assert shard > 32 << 20
    tracemalloc.start()
    assert verify(tmp_path / "data").problems == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < shard / 4

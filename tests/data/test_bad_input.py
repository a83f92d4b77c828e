"""What bad input does on the command line: a message that names file and sample, exit code 2, nothing under the
final name; and once it is repaired the same command goes on."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from documents import files_of, write_documents

from megatron_prolong.data import filter as filter_module
from megatron_prolong.data import pack as pack_module
from megatron_prolong.data.filter import FilterOptions, filter_documents
from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.data.megatron_indexed import to_megatron
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight documents in four shards."""
    return write_documents(tmp_path / "source", [50] * 8, size_limit=1000)


def prolong(*words: object, memory_bytes: int | None = None) -> tuple[int, str]:
    """Exit code and standard error of `prolong data …`."""

    def limit() -> None:
        if memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))

    command = [sys.executable, "-m", "megatron_prolong", "data", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    return done.returncode, done.stderr


def truncate(source: Path) -> None:
    shard = source / "shard.00002.mds"
    shard.write_bytes(shard.read_bytes()[:-3])


def garble(source: Path) -> None:
    """The sizes of the sixth sample's columns, so that it does not decode."""
    shard = source / "shard.00002.mds"
    data = bytearray(shard.read_bytes())
    start = int.from_bytes(data[8:12], "little")
    data[start] ^= 0xFF
    shard.write_bytes(data)


def remove(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "shard.00002.mds: truncated"),
        (garble, "shard.00002.mds"),
        (remove("shard.00002.mds"), "shard.00002.mds: this shard is missing"),
        (remove("index.json"), "there is no index.json"),
    ],
)
@pytest.mark.parametrize("step", ["pack", "filter"])
def test_damaged_data_sets(
    step: str, damage: Callable[[Path], None], said: str, source: Path, tmp_path: Path
) -> None:
    options = ["--length", 20, "--mode", "concat"] if step == "pack" else ["--min-length", 10]
    words = [step, source, tmp_path / "out", *options, "--workers", 1]
    shutil.copytree(source, tmp_path / "sound")
    damage(source)
    code, message = prolong(*words)
    assert (code, message.splitlines()[-1][:7]) == (2, "error: ") and said in message
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source)
    (tmp_path / "sound").rename(source)
    assert prolong(*words)[0] == 0
    assert len(MDSReader(tmp_path / "out")) == (20 if step == "pack" else 8)


def test_a_changed_token_and_a_token_beyond_the_vocabulary(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    (shard,) = (path for path in source.glob("*.mds") if np.uint32(8010).tobytes() in path.read_bytes())
    data = shard.read_bytes()
    shard.write_bytes(data.replace(np.uint32(8010).tobytes(), np.uint32(8011).tobytes()))
    code, message = prolong("verify", source)
    assert code == 2 and f"{shard}: its xxh64 is" in message
    with MDSWriter(tmp_path / "other", {"input_ids": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.array([1, 2, 3], np.uint32)})
        writer.write({"input_ids": np.array([1, 999_999, 3], np.uint32)})
    code, message = prolong("verify", tmp_path / "other", "--tokenizer", tokenizer)
    assert code == 2 and "sample 1: token 999999 at position 1 is not in the vocabulary" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"good, then \xff", "a.txt: is not UTF-8 (byte 11)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, line at byte 14: is not UTF-8"),
        ("a.jsonl", b"", "not a single document in the sources"),
        ("a.txt", b"", "not a single document in the sources; left out: document: empty (1)"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read to its end"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: cannot be read to its end"),
    ],
)
def test_sources(name: str, content: bytes, said: str, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    code, message = prolong("tokenize", tmp_path / name, tmp_path / "out", "--tokenizer", tokenizer)
    assert code == 2 and said in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_line_of_a_gigabyte(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Refused by name, or counted when bad input is to be skipped, within a memory smaller than the line."""
    with (tmp_path / name).open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(1 << 10):
            file.write(b"a line " * (150_000))
        file.write(b'"}\n')
        if name == "a.jsonl":
            file.write(b'{"text": "short"}\n')
    words = ["tokenize", tmp_path / name, tmp_path / "out", "--tokenizer", tokenizer, "--workers", 1]
    code, message = prolong(*words, memory_bytes=1 << 30)
    where = "a.txt" if name == "a.txt" else "a.jsonl, line at byte 0"
    assert code == 2 and f"{where}: is longer than 256 MiB" in message, message
    assert not (tmp_path / "out").exists()
    code, message = prolong(*words, "--on-bad-input", "skip", memory_bytes=1 << 30)
    if name == "a.txt":
        assert code == 2 and "left out: document: too long (1)" in message
    else:
        assert code == 0, message
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["documents"] == 1 and report["left_out"] == {"document: too long": 1}


def test_a_full_disk_while_writing_megatrons_files(tmp_path: Path, small_disk: Path) -> None:
    source = write_documents(tmp_path / "source", [50_000] * 10)
    with pytest.raises(UserError, match=r"disk/out: the disk is full"):
        to_megatron(source, small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """`ulimit -f`, which some clusters set on their login nodes."""
    source = write_documents(tmp_path / "source", [50_000] * 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (
        lambda out: to_megatron(source, out),
        lambda out: pack([source], out, PackOptions(5000, "concat")),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(
                UserError, match=r"out.*: no file may become so large here \(see `ulimit -f`\)"
            ):
                step(tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.tmp-*"))


def test_a_disk_that_cannot_be_written_is_one_message(source: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for words in (["to-megatron"], ["pack", "--mode", "concat", "--length", 64]):
        code, message = prolong(*words, source, small_disk / "out")
        assert code == 2 and "Read-only file system" in message and len(message.splitlines()) == 1
        assert f"{small_disk}/out" in message and ".tmp-" not in message


@pytest.mark.parametrize("step", ["pack", "plan", "filter", "duplicates"])
def test_a_full_disk_and_then_room(
    step: str, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "TASK_TOKENS", 50_000)
    monkeypatch.setattr(filter_module, "TASK_BYTES", 200_000)
    lengths = [10] * 30_000 if step in ("plan", "duplicates") else [50_000] * 10
    source = write_documents(tmp_path / "source", lengths, size_limit=200_000)

    def run(out: Path) -> None:
        if step in ("pack", "plan"):
            pack([source], out, PackOptions(5000, "concat"))
        else:
            filter_documents([source], out, FilterOptions({"": 1}, duplicates=step == "duplicates"))

    if step in ("plan", "duplicates"):  # the table of what is to be done finds no room
        (small_disk / "filler").write_bytes(bytes((1 << 20) - (5 << 12)))
    with pytest.raises(UserError, match=r"disk/out.*: the disk is full.*run the same command again"):
        run(small_disk / "out")
    assert not (small_disk / "out").exists() and not list(small_disk.rglob("*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(small_disk / "out")
    run(tmp_path / "whole")
    assert files_of(small_disk / "out") == files_of(tmp_path / "whole")

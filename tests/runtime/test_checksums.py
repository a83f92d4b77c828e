"""Any byte of any file, any missing or added file, and the list itself: all are noticed."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from megatron_prolong.errors import UserError
from megatron_prolong.runtime import checksums
from megatron_prolong.runtime.checksums import (
    CHECKSUMS,
    HashingFile,
    hash_files,
    verify_checksums,
    write_checksums,
)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_CHUNK_BYTES", 16)  # files are read in several pieces
    (tmp_path / "hf").mkdir()
    (tmp_path / "__0_0.distcp").write_bytes(bytes(range(97)))
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "empty").write_bytes(b"")
    write_checksums(tmp_path)
    return tmp_path


def test_untouched_passes(checkpoint):
    verify_checksums(checkpoint)


def test_every_flipped_byte_is_noticed(checkpoint):
    for name in ("__0_0.distcp", "hf/config.json"):
        path = checkpoint / name
        original = path.read_bytes()
        for place in range(len(original)):
            path.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
            with pytest.raises(UserError, match=rf"{name}: contents changed"):
                verify_checksums(checkpoint)
        path.write_bytes(original)
    verify_checksums(checkpoint)


def test_every_flipped_byte_of_the_list_itself_is_noticed(checkpoint):
    original = (checkpoint / CHECKSUMS).read_bytes()
    for place in range(len(original)):
        changed = original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :]
        (checkpoint / CHECKSUMS).write_bytes(changed)
        with pytest.raises(UserError):
            verify_checksums(checkpoint)


def test_cut_missing_and_added_files_are_all_listed(checkpoint):
    (checkpoint / "__0_0.distcp").write_bytes(b"short")
    (checkpoint / "empty").unlink()
    (checkpoint / "extra").write_text("x")
    with pytest.raises(UserError) as error:
        verify_checksums(checkpoint)
    for part in ("__0_0.distcp: 5 bytes, written as 97", "empty: missing", f"extra: not in {CHECKSUMS}"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "content",
    [None, "", "{}", '{"algorithm": "md5", "files": {}}', '{"algorithm": "xxh3_128", "files": [1]}'],
)
def test_a_damaged_list_is_refused(checkpoint, content):
    if content is None:
        (checkpoint / CHECKSUMS).unlink()
    else:
        (checkpoint / CHECKSUMS).write_text(content)
    with pytest.raises(UserError, match=CHECKSUMS):
        verify_checksums(checkpoint)


def test_ranks_divide_hashing_and_verifying(checkpoint, monkeypatch):
    names = ["__0_0.distcp", "empty", "hf/config.json"]
    write_checksums(checkpoint, hash_files(checkpoint, names[:1]))
    (checkpoint / "empty").write_bytes(b"no longer")
    # No rank asks about the other ranks' files.
    monkeypatch.setattr(Path, "stat", lambda path, **_: pytest.fail(f"asked about {path}"))
    verify_checksums(checkpoint, slice(0, None, 2))  # the first and third file
    with pytest.raises(UserError, match="empty"):
        verify_checksums(checkpoint, slice(1, None, 2))


def test_what_was_hashed_while_it_was_written_is_not_read_again(checkpoint):
    with (checkpoint / "weights").open("wb") as file:
        hashing = HashingFile(file)
        hashing.write(b"head")
        hashing.write(memoryview(array("I", range(5))))
        assert hashing.tell() == file.tell() == 4 + 5 * array("I").itemsize
    write_checksums(checkpoint, {"weights": hashing.entry})
    verify_checksums(checkpoint)
    write_checksums(checkpoint, {"weights": [24, "as it was"]})
    with pytest.raises(UserError, match="weights: contents changed"):
        verify_checksums(checkpoint)

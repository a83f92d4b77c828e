"""A power cut right after a rename: what was not synced is gone, yet every file under a final name is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama3 import llama3_tokenizer

from megatron_prolong.data.filter import FilterOptions, filter_documents
from megatron_prolong.data.mds import merge_tree
from megatron_prolong.data.megatron_indexed import IndexedReader, to_megatron
from megatron_prolong.data.pack import PackOptions, pack
from megatron_prolong.data.tokenize import tokenize
from megatron_prolong.data.verify import verify
from megatron_prolong.runtime.publish import write_durably


@pytest.fixture
def forgetful_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The worst that a file system may do: the rename is on the disk, of the files only what fsync pushed.
    Or the rename is not, unless fsync pushed its directory: those where it did not yet.
    """
    synced: dict[int, int] = {}
    renamed_in: set[int] = set()
    fsync, replace = os.fsync, Path.replace

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        state = os.fstat(descriptor)
        synced[state.st_ino] = state.st_size
        renamed_in.discard(state.st_ino)

    def rename_and_forget(self: Path, target: Path) -> Path:
        renamed = replace(self, target)
        renamed_in.add(target.parent.stat().st_ino)
        for path in [renamed, *renamed.rglob("*")]:
            if path.is_file():
                os.truncate(path, min(path.stat().st_size, synced.get(path.stat().st_ino, 0)))
        return renamed

    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(Path, "replace", rename_and_forget)
    yield renamed_in
    assert not renamed_in, "what was said to be written may have its old name"


def test_every_step_of_the_data_survives(tmp_path: Path, forgetful_disk: set[int]) -> None:
    llama3_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts").mkdir()
    for name in ("first", "second", "again"):
        (tmp_path / "texts" / f"{name}.txt").write_text(
            f"The {name.replace('again', 'first')} of two texts. " * 9
        )
    documents, kept, packed = (tmp_path / name for name in ("documents", "kept", "packed"))
    tokenize([str(tmp_path / "texts")], tmp_path / "tokenizer", documents)
    assert not forgetful_disk
    filter_documents([documents], kept, FilterOptions(duplicates=True))
    assert not forgetful_disk
    pack([kept], packed, PackOptions(length=16, mode="concat"))
    assert not forgetful_disk
    num_packs = to_megatron(packed, tmp_path / "megatron")
    assert merge_tree(packed) == num_packs > 1
    for directory, num_samples in ((documents, 3), (kept, 2), (packed, num_packs)):
        found = verify(directory)
        assert (found.problems, found.num_samples) == ([], num_samples)
        assert json.loads((directory / "report.json").read_text())
    assert [len(tokens) for tokens, _ in IndexedReader(tmp_path / "megatron")] == [16] * num_packs


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path, forgetful_disk: set[int]) -> None:
    write_durably(tmp_path / "latest", "step_00000125")
    assert (tmp_path / "latest").read_text() == "step_00000125"
    with pytest.raises(UnicodeEncodeError):
        write_durably(tmp_path / "latest", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"], "nothing half-written stays beside it"

"""`--workers N` writes N files at once and changes nothing about what is in them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from families import save_family
from torch import Tensor
from typer.testing import CliRunner

from megatron_prolong.cli.main import app
from megatron_prolong.convert import dist_writer, hf_writer, transfer
from megatron_prolong.convert.compare import compare

Gather = Callable[..., Tensor]


def _gather_that_waits_for(threads: int, gather: Gather, seen: set[int]) -> Gather:
    """`gather`, but nothing is read before that many threads have begun a file."""
    begun = threading.Barrier(threads, timeout=60)

    def waiting(*args: object) -> Tensor:
        if (me := threading.get_ident()) not in seen:
            seen.add(me)
            begun.wait()
        return gather(*args)

    return waiting


def _convert(direction: str, source: Path, target: Path, workers: int, patch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    module = dist_writer if direction == "to-megatron" else hf_writer
    with patch.context() as during:
        during.setattr(module, "gather", _gather_that_waits_for(workers, module.gather, seen))
        arguments = ["convert", direction, str(source), str(target), "--workers", str(workers)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert len(seen) == workers


def test_three_workers_write_three_files_at_once_and_the_same_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = save_family("llama3", tmp_path / "original")
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(hf_writer, "LARGEST_SHARD", 200_000)
    for workers in (1, 3):
        _convert("to-megatron", original, tmp_path / f"megatron-{workers}", workers, monkeypatch)
        assert len(list((tmp_path / f"megatron-{workers}").glob("__0_[0-9]*.distcp"))) >= workers
        assert compare(original, tmp_path / f"megatron-{workers}").equal
    for workers in (1, 3):
        _convert("to-hf", tmp_path / "megatron-3", tmp_path / f"hf-{workers}", workers, monkeypatch)
    one, three = (
        {path.name: path.read_bytes() for path in (tmp_path / f"hf-{workers}").iterdir()}
        for workers in (1, 3)
    )
    assert one == three
    assert compare(original, tmp_path / "hf-3").equal


def test_neighbours_fill_a_file_to_its_last_byte() -> None:
    assert transfer.grouped([2, 2, 1, 5, 9, 3, 1], lambda item: item, 4) == [[2, 2], [1], [5], [9], [3, 1]]


def test_no_worker_is_no_number(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["convert", "to-hf", str(tmp_path), str(tmp_path / "out"), "--workers", "0"]
    )
    assert result.exit_code == 2

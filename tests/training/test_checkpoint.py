"""Saving in the background: what is on the disk at every moment, whatever goes wrong; and loading runs no code."""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from packaging.version import Version
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_prolong.convert.unpickle import COMMON_STATE, load_metadata
from megatron_prolong.data.batch import collate_pieces
from megatron_prolong.data.packed import Piece
from megatron_prolong.errors import JointError, UserError
from megatron_prolong.mcore import checkpoint as saved
from megatron_prolong.mcore.build import StageModel, build_model
from megatron_prolong.mcore.checkpoint import (
    SaveStrategy,
    _model_state,
    _WeightsOnlyPlanner,
    load_weights,
    load_weights_and_optimizer,
    state_bytes,
    take_snapshot,
    training_state,
)
from megatron_prolong.mcore.groups import ParallelGroups, megatron
from megatron_prolong.mcore.micro_batch import micro_batch
from megatron_prolong.mcore.optimizer import MegatronOptimizer, build_optimizer
from megatron_prolong.mcore.optimizer_shards import METADATA
from megatron_prolong.recipe.schema import CheckpointSpec, Layout, OptimizerSpec
from megatron_prolong.recipe.shape import ModelShape
from megatron_prolong.runtime import passing
from megatron_prolong.runtime.checksums import Entries, hash_files, verify_checksums
from megatron_prolong.training import checkpoint
from megatron_prolong.training.run_directory import latest_checkpoint
from megatron_prolong.training.step import train_step
from tests.mcore.saving import save_weights_and_optimizer

with_common_file = pytest.mark.skipif(
    Version(megatron_core_version) >= Version("0.19"), reason="plain values are no file of their own"
)

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=99,
    max_length=64, rope_base=1e4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@dataclass
class FakeSnapshot:
    """Writes a file of `num_bytes` when it is allowed to."""

    directory: Path
    num_bytes: int = 10
    may_write: threading.Event = field(default_factory=threading.Event)

    def write(self) -> Entries:
        assert self.may_write.wait(60)
        with (self.directory / "weights").open("wb") as file:
            torch.save(torch.zeros(self.num_bytes, dtype=torch.uint8), file)
        return hash_files(self.directory, ["weights"])

    def finish(self) -> None:
        (self.directory / "contents").write_text("weights")


class Bench:
    """A CheckpointWriter whose snapshots are fakes, kept in `snapshots`; they write at once unless `slow`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **spec: object) -> None:
        self.snapshots: list[FakeSnapshot] = []
        self.slow, self.num_bytes, self.reports = False, 10, []
        monkeypatch.setattr(passing, "WAITS_SECONDS", (0.0, 0.0, 0.0))
        monkeypatch.setattr(checkpoint, "training_state", lambda model, optimizer: {})
        monkeypatch.setattr(checkpoint, "state_bytes", lambda state: 10)
        monkeypatch.setattr(checkpoint, "take_snapshot", self._take)
        (root / "hf").mkdir()
        (root / "hf" / "tokenizer.json").write_text("{}")
        self.stage = root / "stage"
        self.writer = checkpoint.CheckpointWriter(
            self.stage, CheckpointSpec(**spec), root / "hf", "name: test\n", self.reports.append
        )

    def _take(self, directory: Path, *_: object) -> FakeSnapshot:
        snapshot = FakeSnapshot(directory, self.num_bytes)
        if not self.slow:
            snapshot.may_write.set()
        self.snapshots.append(snapshot)
        return snapshot

    def save(self, step: int) -> None:
        manifest = {"format": 1, "kind": "training", "shape": SHAPE.to_dict(), "step": step}
        self.writer.save(None, None, manifest)

    @property
    def newest(self) -> int | None:
        found = latest_checkpoint(self.stage)
        if found is not None:
            verify_checksums(found.directory)
        return found and found.step

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.stage.iterdir())


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def test_training_goes_on_while_it_is_written_and_nobody_sees_it_before(bench):
    bench.save(1)
    bench.writer.finish()
    bench.slow = True
    bench.save(2)  # returns although nothing can be written yet
    assert bench.writer.writing()
    bench.writer.poll(1)
    assert bench.newest == 1 and bench.names == ["latest", "step_00000001", "step_00000002.partial"]
    bench.snapshots[-1].may_write.set()
    while bench.writer.writing():
        time.sleep(0.01)
    bench.writer.poll(0)
    assert bench.newest == 2
    assert (bench.stage / "step_00000002" / "recipe.yaml").read_text() == "name: test\n"
    assert (bench.stage / "step_00000002" / "hf" / "tokenizer.json").exists()
    assert bench.reports[-1]["step"] == 2


def test_it_is_not_complete_before_every_rank_has_written(bench):
    bench.save(1)
    bench.writer._pending.thread.join()
    bench.writer.poll(1)  # another one writes
    assert bench.newest is None
    bench.writer.poll(0)
    assert bench.newest == 1
    assert not bench.writer.writing()
    bench.writer.poll(0)  # nothing is pending
    assert len(bench.reports) == 1


@pytest.mark.parametrize("others_can", [False, True])
@pytest.mark.parametrize("kind", [UserError, OSError])
def test_data_that_no_rank_can_read_loses_no_save(bench, monkeypatch, kind, others_can):
    def batches():
        yield "batch"
        raise kind("a damaged shard")

    read = bench.writer.reading(batches())
    assert next(read) == "batch"
    bench.save(1)
    if others_can:
        monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 2)
    with pytest.raises(kind, match="a damaged shard"):
        next(read)
    assert bench.newest == (None if others_can else 1)


def test_one_save_at_a_time(bench):
    bench.slow = True
    bench.save(1)
    threading.Timer(0.2, bench.snapshots[0].may_write.set).start()
    bench.save(2)
    assert bench.newest == 1
    bench.snapshots[1].may_write.set()
    bench.writer.finish()
    assert bench.newest == 2


def test_without_async_it_is_complete_on_return(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, async_save=False)
    bench.save(1)
    assert bench.newest == 1


def test_the_newest_and_every_nth_are_kept(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, keep=2, keep_every=4, async_save=False)
    for step in range(1, 12):
        bench.save(step)
    kept = ["step_00000004", "step_00000008", "step_00000010", "step_00000011"]
    assert bench.names == ["latest", *kept]


def test_a_run_put_back_to_an_older_checkpoint_keeps_what_it_saves(tmp_path, monkeypatch):
    """Newer ones of the history that was given up do not count: `latest` never names one that was deleted. Nor do
    they become the run's own when it has passed them: going back once more would end in that history."""
    bench = Bench(tmp_path, monkeypatch, keep=2, keep_every=10, async_save=False)
    for step in range(5, 35, 5):
        bench.save(step)
    (bench.stage / "latest").write_text("step_00000010\n")
    bench.save(15)
    assert bench.newest == 15
    bench.save(17)
    assert bench.newest == 17
    later = ["step_00000020", "step_00000025", "step_00000030"]
    assert bench.names == ["latest", "step_00000010", "step_00000015", "step_00000017", *later]
    bench.save(20)  # in place of the one of the other history
    assert bench.newest == 20
    assert bench.names == ["latest", "step_00000010", "step_00000017", *later]
    bench.save(27)  # past another of them
    assert bench.newest == 27
    assert bench.names == ["latest", "step_00000010", "step_00000020", "step_00000027", "step_00000030"]


def test_an_old_checkpoint_that_cannot_be_deleted_yet_stops_nothing(tmp_path, monkeypatch):
    """On NFS a directory with a file that somebody still reads is never empty; it goes with the next save."""
    bench = Bench(tmp_path, monkeypatch, keep=1, async_save=False)
    bench.save(1)
    rmdir = os.rmdir

    def busy(path, **options):
        if "removed" in str(path):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmdir(path, **options)

    with monkeypatch.context() as while_it_is_read:
        while_it_is_read.setattr(os, "rmdir", busy)
        bench.save(2)
    assert bench.newest == 2
    assert not (bench.stage / "step_00000001").exists()
    bench.save(3)
    assert bench.names == ["latest", "step_00000003"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_an_old_checkpoint_that_cannot_be_removed_goes_with_the_next_save(
    tmp_path, monkeypatch, capfd, number
):
    """It ended the run, though the new one was complete."""
    bench = Bench(tmp_path, monkeypatch, keep=1, async_save=False)
    bench.save(1)
    rename = Path.rename

    def refused(path, target):
        if path.name == "step_00000001":
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(Path, "rename", refused)
        bench.save(2)
    assert bench.newest == 2 and bench.names == ["latest", "step_00000001", "step_00000002"]
    assert (
        f"warning: {bench.stage}: old checkpoints stay until the next one is saved" in capfd.readouterr().err
    )
    bench.save(3)
    assert bench.names == ["latest", "step_00000003"]


def test_what_killed_processes_left_is_gone_before_space_is_looked_for(bench, monkeypatch):
    """A disk that holds a checkpoint more than is kept has no room for half a one and another one."""
    bench.save(1)
    bench.writer.finish()
    stage_before = bench.stage.parent / "before"
    leftovers = [
        bench.stage / "step_00000002.partial",
        bench.stage / "latest.tmp-prolong-elsewhere-1",
        bench.stage / "step_00000000.removed.tmp-prolong-elsewhere-1",
        stage_before / "step_00000008.removed.tmp-prolong-elsewhere-1",  # at the end of its last save
    ]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
        (leftover / "weights").touch()
    export = stage_before / "step_00000008-hf.tmp-prolong-elsewhere-1"  # at work on another machine, maybe
    export.mkdir()
    usage = shutil.disk_usage(bench.stage)

    def free(path):
        left = [leftover for leftover in leftovers if leftover.exists()]
        return usage._replace(free=10 - len(left))

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", free)
    bench.save(3)
    assert bench.names == ["latest", "step_00000001", "step_00000003.partial"]
    assert export.exists()


def test_half_a_checkpoint_that_cannot_be_deleted_yet_stops_nothing(bench, monkeypatch):
    """A killed process may still have its file open, and the run has come to the same step again."""
    (bench.stage / "step_00000001.partial").mkdir(parents=True)

    def busy(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    bench.save(1)
    bench.writer.finish()
    assert bench.newest == 1


def test_no_space_is_seen_before_anything_is_written(bench, monkeypatch):
    bench.save(1)
    bench.writer.finish()
    usage = shutil.disk_usage(bench.stage)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(UserError, match=r"step_00000002 needs .* GiB free"):
        bench.save(2)
    assert bench.newest == 1 and bench.names == ["latest", "step_00000001"]
    assert len(bench.snapshots) == 1


def test_a_disk_that_fills_up_loses_nothing(small_disk, monkeypatch):
    """A real one, of 1 MiB: the first checkpoint stays, the second leaves nothing; with room it goes on."""
    bench = Bench(small_disk, monkeypatch)
    bench.num_bytes = 600_000
    bench.save(1)
    bench.writer.finish()
    bench.save(2)
    with pytest.raises(
        UserError, match=r"step_00000002 could not be saved:\n  - the disk is full"
    ) as refused:
        bench.writer.finish()
    assert refused.value.exit_code == 2, "it would be full again"
    assert bench.newest == 1 and bench.names == ["latest", "step_00000001"]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    bench.save(2)
    bench.writer.finish()
    assert bench.newest == 2


def test_a_disk_that_is_full_for_megatrons_own_files_names_the_checkpoint(bench, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as at_the_beginning:
        at_the_beginning.setattr(checkpoint, "take_snapshot", full)
        with pytest.raises(UserError, match=r"step_00000001 could not be saved:\n  - the disk is full"):
            bench.save(1)
    assert bench.names == []
    monkeypatch.setattr(FakeSnapshot, "finish", full)
    bench.save(1)
    with pytest.raises(UserError, match=r"step_00000001 could not be saved:\n  - the disk is full"):
        bench.writer.finish()
    assert bench.names == [], "the weights would fill the disk for ever"


def test_of_torchs_errors_only_those_over_a_full_disk_are_explained(bench, monkeypatch):
    """Another one may say that a rank is lost."""
    for cause in (OSError(errno.ENOSPC, "No space left on device"), None):

        def fail(*_, cause=cause):
            raise RuntimeError("unexpected pos 64 vs 0") from cause

        monkeypatch.setattr(checkpoint, "take_snapshot", fail)
        kind, said = (UserError, "the disk is full") if cause else (RuntimeError, "unexpected pos")
        with pytest.raises(kind, match=said):
            bench.save(1)


def another_rank(monkeypatch, entries: Entries, problem: UserError | None) -> None:
    """Let it have written its share."""

    def all_gather_object(found, own, group=None):
        found[0] = own
        if isinstance(own[0], dict):
            found.append((entries, problem))

    monkeypatch.setattr(checkpoint.dist, "all_gather_object", all_gather_object)


FULL = "the disk is full; make room and start again: the run continues from its newest checkpoint"


@pytest.mark.parametrize(
    ("own", "others", "exit_code", "said"),
    [
        (RuntimeError("torn"), None, 1, ["rank 0: RuntimeError: torn"]),
        (OSError(errno.EROFS, "Read-only"), None, 2, ["rank 0: OSError: [Errno 30] Read-only"]),
        (OSError(errno.EIO, "I/O"), UserError(FULL), 2, ["rank 0: OSError: [Errno 5] I/O", FULL]),
        (OSError(errno.ENOSPC, "No space"), UserError(FULL), 2, [FULL]),
    ],
    ids=["torch", "forbidden", "two", "the same"],
)
def test_what_ranks_met_is_said_once_and_whether_to_start_again(
    bench, monkeypatch, own, others, exit_code, said
):
    def write(self):
        raise own

    monkeypatch.setattr(FakeSnapshot, "write", write)
    another_rank(monkeypatch, {}, others)
    bench.save(1)
    with pytest.raises(UserError, match="step_00000001 could not be saved") as refused:
        bench.writer.finish()
    assert str(refused.value).split("\n  - ")[1:] == said and refused.value.exit_code == exit_code


def test_checksums_are_of_what_every_rank_has_written_not_of_what_is_read_later(bench, monkeypatch):
    another_rank(monkeypatch, {"theirs": [3, "of another content"]}, None)
    bench.save(1)
    bench.writer._pending.thread.join()
    for name in ("weights", "theirs"):
        (bench.snapshots[0].directory / name).write_text("bad")
    bench.writer.finish()
    with pytest.raises(UserError, match=r"theirs: contents changed(?s:.*)weights: 3 bytes, written as"):
        verify_checksums(bench.stage / "step_00000001")


def test_a_report_says_how_long_training_stood_still(bench, monkeypatch):
    clock = [0.0]

    def take(directory, *_):
        clock[0] += 2
        return bench._take(directory)

    def finish(self):
        clock[0] += 3

    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(checkpoint, "take_snapshot", take)
    monkeypatch.setattr(FakeSnapshot, "finish", finish)
    monkeypatch.setattr(checkpoint.dist, "all_reduce", lambda number: number.mul_(2))  # two ranks
    bench.save(7)
    clock[0] += 10
    bench.writer.finish()
    expected = {"stage": "stage", "step": 7, "bytes": 20, "seconds": 15, "stall_seconds": 5}
    assert bench.reports == [expected]


def test_a_disk_with_no_room_for_the_tokenizer_is_full(small_disk, monkeypatch):
    """Not a file server's fault that may go: a batch script would start the run again, to no end."""
    bench = Bench(small_disk, monkeypatch)
    (small_disk / "hf" / "templates").mkdir()
    (small_disk / "hf" / "templates" / "tokenizer.json").write_bytes(bytes(400_000))
    bench.num_bytes = 500_000
    bench.save(1)
    with pytest.raises(
        UserError, match=r"step_00000001 could not be saved:\n  - the disk is full"
    ) as refused:
        bench.writer.finish()
    assert refused.value.exit_code == 2 and bench.names == []


def test_what_cannot_be_completed_is_no_checkpoint(bench):
    bench.save(1)
    bench.writer.finish()
    bench.save(2)
    shutil.rmtree(bench.stage.parent / "hf")
    with pytest.raises(UserError, match="hf"):
        bench.writer.finish()
    assert bench.newest == 1 and bench.names == ["latest", "step_00000001"]


def test_latest_never_names_what_has_not_got_its_name_yet(bench, monkeypatch):
    bench.save(1)
    bench.writer.finish()
    bench.save(2)

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(checkpoint, "publish", stale)
    with pytest.raises(UserError, match=r"step_00000002 could not be saved:\n  - rank 0: .*Stale") as refused:
        bench.writer.finish()
    assert refused.value.exit_code == 1 and bench.newest == 1


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize(
    "place",
    [
        "FakeSnapshot.write",
        "shutil.disk_usage",
        "shutil.copyfile",
        "write_checksums",
        "publish",
        "write_pointer",
    ],
)
def test_a_fault_of_the_file_server_costs_no_checkpoint(bench, monkeypatch, place, count, capfd):
    """It ended the run, and the state was in memory. After each it is looked for anew what is done already."""
    bench.save(1)
    bench.writer.finish()
    owner, _, name = f"checkpoint.{place}".rpartition(".")
    owner = FakeSnapshot if place == "FakeSnapshot.write" else eval(owner)
    function, failed = getattr(owner, name), []

    def fails_at_first(*arguments):
        if len(failed) < count:
            failed.append(OSError(errno.ESTALE, "Stale file handle"))
            if name == "publish":
                function(*arguments)  # all but the last sync
            raise failed[-1]
        return function(*arguments)

    with monkeypatch.context() as for_a_while:
        for_a_while.setattr(owner, name, fails_at_first)
        if count == 4 and name != "publish":
            with pytest.raises(UserError, match="Stale file handle") as refused:
                bench.save(2)
                bench.writer.finish()
            assert refused.value.exit_code == 1 and bench.newest == 1
            return
        bench.save(2)
        bench.writer.finish()
    assert bench.newest == 2 and bench.names == ["latest", "step_00000001", "step_00000002"]
    assert capfd.readouterr().err.count("step_00000002: [Errno 116]") == len(failed)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_changed_byte_is_noticed_by_the_rank_that_reads_the_file(bench, monkeypatch, num_ranks):
    bench.save(1)
    bench.writer.finish()
    directory = bench.stage / "step_00000001"
    monkeypatch.setattr(checkpoint, "against_main", lambda *_: None)
    monkeypatch.setattr(checkpoint, "together", lambda action: action())
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: num_ranks)
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "checksums.json"]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        path.write_bytes(b"?" + content[1:])
        noticed = 0
        for rank in range(num_ranks):
            monkeypatch.setattr(checkpoint.dist, "get_rank", lambda rank=rank: rank)
            try:
                checkpoint.verify_checkpoint(directory)
            except UserError as error:
                noticed += f"{path.relative_to(directory)}: contents changed" in str(error)
        assert noticed == 1, path
        path.write_bytes(content)


def test_what_could_not_be_written_is_named_also_where_it_cannot_be_deleted(bench):
    bench.slow = True
    bench.save(1)
    shutil.rmtree(bench.snapshots[0].directory)
    bench.snapshots[0].may_write.set()
    with pytest.raises(UserError, match="step_00000001 could not be saved") as refused:
        bench.writer.finish()
    assert refused.value.exit_code == 1, "a file server's fault may go"


class Trained(NamedTuple):
    model: StageModel
    optimizer: MegatronOptimizer
    groups: ParallelGroups


@pytest.fixture
def trained():
    """A model and optimizer after one update, inside Megatron's setup."""
    with megatron(Layout(), seed=1) as groups:
        model = build_model(SHAPE, Layout(), precision="fp32", recompute="full")
        optimizer = build_optimizer(model, OptimizerSpec(), Layout(), lr=0.1)
        with torch.no_grad():
            for chunk in model.chunks:
                for weight in chunk.parameters():
                    weight.normal_()
                    weight.main_grad.normal_()
        optimizer.reload_model_params()
        optimizer.step()
        yield Trained(model, optimizer, groups)


def numbers(model, optimizer) -> list[torch.Tensor]:
    """Every weight and moment, copied."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    moments = [value for state in inner.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in [*model.chunks[0].parameters(), *moments]]


def test_a_snapshot_is_of_its_moment(trained, tmp_path):
    """Everything changes between the copy and the writing; the file has what there was at the copy."""
    model, optimizer, _ = trained
    expected = numbers(model, optimizer)
    snapshot = take_snapshot(tmp_path, training_state(model, optimizer), SaveStrategy())
    for _ in range(2):
        optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(expected, numbers(model, optimizer), strict=True))
    entries = snapshot.write()
    assert entries == hash_files(tmp_path, ["__0_0.distcp"])
    snapshot.finish()
    load_weights_and_optimizer(tmp_path, model, optimizer)
    for found, wanted in zip(numbers(model, optimizer), expected, strict=True):
        assert torch.equal(found, wanted)


def test_completing_a_save_needs_no_gpu(trained, tmp_path, monkeypatch):
    """Where the GPU is full, there is no memory for a message to all ranks."""
    snapshot = take_snapshot(tmp_path, training_state(trained.model, trained.optimizer), SaveStrategy())
    snapshot.write()
    monkeypatch.delattr(torch.cuda, "current_device")
    snapshot.finish()


def test_the_size_of_a_checkpoint_counts_what_several_ranks_hold_once(trained):
    model, optimizer, _ = trained
    num_weights = sum(weight.numel() for weight in model.chunks[0].parameters())
    state = training_state(model, optimizer)
    assert state_bytes(state) == 16 * num_weights  # fp32: weights twice, and two moments
    for replica in nested_values(state["model"]):
        replica.replica_id = (0, 0, 1)
    assert state_bytes(state) == 12 * num_weights


@with_common_file
def test_a_rank_may_have_nothing_to_write(trained, tmp_path):
    """All it holds may be written by others that hold the same."""
    snapshot = take_snapshot(tmp_path, {"step": 1}, SaveStrategy())
    assert snapshot.write() == {}
    snapshot.finish()
    assert not list(tmp_path.glob("*.distcp"))


def test_a_disk_that_turns_out_full_at_the_end_is_noticed(trained, tmp_path, monkeypatch):
    """NFS takes a file and says only when it is synced that there is no room for it."""
    snapshot = take_snapshot(tmp_path, training_state(trained.model, trained.optimizer), SaveStrategy())

    def full(_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(saved.os, "fsync", full)
    with pytest.raises(OSError, match="quota"):
        snapshot.write()


def test_saving_compares_no_boxes_and_the_table_of_contents_says_all_once(trained, tmp_path, monkeypatch):
    """With 512 ranks a 70B model has 350,000 boxes, and a load reads the table on every one of them."""
    model, optimizer, _ = trained
    monkeypatch.delattr(default_planner, "_check_box_overlap")
    save_weights_and_optimizer(tmp_path, model, optimizer)
    monkeypatch.undo()
    assert not hasattr(load_metadata(tmp_path / ".metadata"), "all_local_plans")
    reads = []
    monkeypatch.setattr(saved, "load_metadata", lambda path: reads.append(path) or load_metadata(path))
    load_weights_and_optimizer(tmp_path, model, optimizer)
    assert reads == [tmp_path / ".metadata"]


@pytest.mark.parametrize("rows", [[(0, 2), (3, 1)], [(0, 2), (0, 2)], [(0, 2), (2, 2), (4, 1)]])
def test_what_is_missing_or_there_twice_is_not_saved(rows):
    """Of a weight of 4 rows: a row missing, two twice, one too many."""
    properties = TensorProperties(dtype=torch.float32)
    plans = []
    for start, count in rows:
        box = ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([count, 3]))
        data = TensorWriteData(chunk=box, properties=properties, size=torch.Size([4, 3]))
        index = MetadataIndex("weight", box.offsets)
        plans.append(SavePlan([WriteItem(index, WriteItemType.SHARD, tensor_data=data)]))
    with pytest.raises(AssertionError, match="weight"):
        saved._SavePlanner(flatten_state_dict=False).create_global_plan(plans)


def test_a_load_reads_a_rank_s_shards_only(trained, tmp_path, monkeypatch):
    """Megatron's own takes 12 bytes of every rank's host memory for each weight of the model."""
    model, optimizer, _ = trained
    save_weights_and_optimizer(tmp_path, model, optimizer)
    monkeypatch.delattr(DistributedOptimizer, "get_parameter_state_dp_zero")
    load_weights_and_optimizer(tmp_path, model, optimizer)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("bias_correction", True),  # Transformer Engine's Adam reads it; PyTorch's kernels save none
        ("lr_mult", 0.5),  # by which Megatron finds a group, as since 0.19.2 by the learning rate
        ("max_lr", 0.5),
    ],
)
def test_groups_keep_their_own_settings(trained, tmp_path, name, own):
    model, optimizer, _ = trained
    save_weights_and_optimizer(tmp_path, model, optimizer)
    for group in optimizer.param_groups:
        group[name], group["step"] = own, 7
    load_weights_and_optimizer(tmp_path, model, optimizer)
    assert [(group[name], group["step"]) for group in optimizer.param_groups] == [(own, 1)] * 2
    assert [group["wd_mult"] for group in optimizer.param_groups] == [1.0, 0.0]


def test_the_saves_of_a_stage_are_planned_once(trained, tmp_path, monkeypatch):
    """And anew when something else is saved, here the weights alone, or began to be."""
    model, optimizer, _ = trained
    strategy, calls = SaveStrategy(), Counter()
    for owner, name in (
        (saved._SavePlanner, "create_global_plan"),
        (fully_parallel, "determine_global_metadata"),
    ):
        monkeypatch.setattr(owner, name, counted(calls, name, getattr(owner, name)))

    def save(name: str, what: MegatronOptimizer | None) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        save_weights_and_optimizer(directory, model, what, strategy)
        return directory

    for number in range(4):
        if number == 3:
            with monkeypatch.context() as broken:
                broken.delattr(FileSystemWriterAsync, "prepare_write_data")
                with pytest.raises(AttributeError):
                    save("broken", None)
        expected, steps = numbers(model, optimizer), steps_of(optimizer)
        directory = save(f"all {number}", optimizer)
        optimizer.step()
        load_weights_and_optimizer(directory, model, optimizer)
        for found, wanted in zip(numbers(model, optimizer), expected, strict=True):
            assert torch.equal(found, wanted)
        assert steps_of(optimizer) == steps
        assert set(calls.values()) == {1 if number < 3 else 3}
        optimizer.step()
    expected = [weight.detach().clone() for weight in model.chunks[0].parameters()]
    directory = save("weights", None)
    optimizer.step()
    load_weights(directory, model)
    for found, wanted in zip(model.chunks[0].parameters(), expected, strict=True):
        assert torch.equal(found, wanted)


def steps_of(optimizer: MegatronOptimizer) -> list[int]:
    return [group["step"] for group in optimizer.param_groups]


def counted(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls[name] += 1
        return function(*args)

    return call


def test_megatrons_own_loader_reads_a_rank_s_shards_too(trained, tmp_path):
    model, optimizer, _ = trained
    save_weights_and_optimizer(tmp_path, model, optimizer)
    expected = numbers(model, optimizer)
    optimizer.step()
    state = _model_state(model)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(METADATA))
    loaded = dist_checkpointing.load(state, str(tmp_path), validate_access_integrity=False)
    model.bare_chunks[0].load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for found, wanted in zip(numbers(model, optimizer), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_run_whose_first_steps_were_all_skipped_can_be_saved(tmp_path):
    """Adam has no moments before its first update."""
    with megatron(Layout(), seed=1):
        model = build_model(SHAPE, Layout(), precision="fp32", recompute="full")
        optimizer = build_optimizer(model, OptimizerSpec(), Layout(), lr=0.1)
        save_weights_and_optimizer(tmp_path, model, optimizer)
        optimizer.step()
        load_weights_and_optimizer(tmp_path, model, optimizer)
        assert [group["step"] for group in optimizer.param_groups] == [0, 0]
        weights = list(model.chunks[0].parameters())
        assert not any(moment.any() for moment in numbers(model, optimizer)[len(weights) :])


def test_a_step_draws_no_random_number(trained):
    """Dropout is 0 and the data a function of the step, so no generator's state belongs in a checkpoint."""
    model, optimizer, groups = trained
    pieces = [Piece(np.arange(1, 1 + length, dtype=np.uint32), None) for length in (7, 20)]
    batch = collate_pieces(pieces)
    micro = micro_batch(batch, groups=groups, layout=Layout(), device=torch.device("cpu"))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    metrics = train_step(model, optimizer, [micro], groups, spec=OptimizerSpec(), lr=1e-3)
    assert metrics.updated
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_batch_without_targets_leaves_the_weights_alone(trained):
    """Its loss would be 0, and weight decay and Adam's momentum would move the weights."""
    model, optimizer, groups = trained
    batch = collate_pieces([Piece(np.arange(1, 8, dtype=np.uint32), np.zeros(7, np.uint8))])
    micro = micro_batch(batch, groups=groups, layout=Layout(), device=torch.device("cpu"))
    before = numbers(model, optimizer)
    metrics = train_step(
        model, optimizer, [micro], groups, spec=OptimizerSpec(), lr=1e-3, tell=lambda: [1.0, 0.5]
    )
    assert not metrics.updated and math.isnan(metrics.loss) and metrics.num_targets == 0
    assert metrics.told == [1.0, 0.5]  # although there was nothing to learn
    assert all(torch.equal(*pair) for pair in zip(before, numbers(model, optimizer), strict=True))


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(trained, bad, clip):
    """The loss may be a number all the same."""
    model, optimizer, groups = trained
    batch = collate_pieces([Piece(np.arange(1, 8, dtype=np.uint32), None)])
    micro = micro_batch(batch, groups=groups, layout=Layout(), device=torch.device("cpu"))
    before = numbers(model, optimizer)
    *_, weight = model.chunks[0].parameters()

    def spoil() -> None:
        weight.main_grad.flatten()[0] = bad

    spec = OptimizerSpec(clip=clip)
    metrics = train_step(model, optimizer, [micro], groups, spec=spec, lr=1e-3, computed=spoil)
    assert not metrics.updated and math.isfinite(metrics.loss) and not math.isfinite(metrics.grad_norm)
    assert all(torch.equal(*pair) for pair in zip(before, numbers(model, optimizer), strict=True))
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert train_step(model, optimizer, [micro], groups, spec=spec, lr=1e-3).updated


class Exploit:
    """Unpickling it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name", [".metadata", pytest.param("common.pt", marks=with_common_file), "__0_0.distcp"]
)
def test_loading_runs_nothing_from_the_files(trained, tmp_path, name):
    model, optimizer, _ = trained
    directory, mark = tmp_path / "checkpoint", tmp_path / "ran"
    directory.mkdir()
    save_weights_and_optimizer(directory, model, optimizer)
    load_weights_and_optimizer(directory, model, optimizer)
    evil = io.BytesIO()
    torch.save(Exploit(mark), evil)
    path = directory / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(Exploit(mark)))
        pickle.loads(path.read_bytes())  # it does work
        mark.rmdir()
    elif name == "common.pt":
        path.write_bytes(evil.getvalue())
    else:  # at the end of the file, where the table of contents now finds the first tensor
        contents = pickle.loads((directory / ".metadata").read_bytes())
        stored = next(iter(contents.storage_data.values()))
        stored.offset, stored.length = path.stat().st_size, len(evil.getvalue())
        (directory / ".metadata").write_bytes(pickle.dumps(contents))
        path.write_bytes(path.read_bytes() + evil.getvalue())
    with pytest.raises(UserError, match=str(directory)):
        load_weights_and_optimizer(directory, model, optimizer)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.json", None, "{path}: no such file; the checkpoint is incomplete"),
        ("metadata.json", b"[]", "{path}: damaged, or not plain values (.*list.*)"),
        ("metadata.json", b'{"sharded', "{path}: damaged, or not plain values (Unterminated string.*)"),
        pytest.param(
            "common.pt", None, "{path}: no such file; the checkpoint is incomplete", marks=with_common_file
        ),
        pytest.param(
            "common.pt", b"", "{path}: damaged, or not plain values (EOFError())", marks=with_common_file
        ),
        pytest.param("common.pt", b"PK", "{path}: damaged, or not plain values (.*)", marks=with_common_file),
        ("__0_0.distcp", None, "checkpoint {directory} cannot be read:\n  - .*No such file.*"),
        ("__0_0.distcp", b"", "checkpoint {directory} cannot be read:\n  - EOFError()"),
    ],
)
def test_damage_is_told_in_a_sentence_where_no_checksums_tell_it(trained, tmp_path, name, content, said):
    """As when a copy was cut off, of a checkpoint that another program wrote."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    save_weights_and_optimizer(directory, trained.model, trained.optimizer)
    path = directory / name
    path.unlink() if content is None else path.write_bytes(content)
    pattern = said.format(path=path, directory=directory).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(JointError, match=f"^{pattern}$"):
        load_weights_and_optimizer(directory, trained.model, trained.optimizer)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_file_server_that_does_not_give_a_checkpoint_now_may_be_asked_again(tmp_path, lasting):
    faults = [
        OSError(errno.EIO, "I/O"),
        OSError(errno.ENOENT if lasting else errno.ETIMEDOUT, "of another rank"),
    ]
    failures = {rank: (fault, None) for rank, fault in enumerate(faults)}
    unreadable = saved._unreadable(tmp_path, CheckpointException("load", failures))
    assert unreadable.exit_code == (2 if lasting else 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_plain_values_that_megatron_0_19_saves_as_an_object(tmp_path, monkeypatch):
    def read(values):
        directory = tmp_path / type(values).__name__
        torch_checkpoint.save(
            {COMMON_STATE: [values]},
            storage_writer=torch_checkpoint.FileSystemWriter(directory),
            planner=default_planner.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
        (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        return saved._common_values(directory, saved._SafeReader(str(directory)))

    monkeypatch.setattr(saved, "_MEGATRON", (0, 18, 2))
    with pytest.raises(UserError, match=r"saved by Megatron-Core 0\.19 or later, and .* cannot load it"):
        read([])
    monkeypatch.setattr(saved, "_MEGATRON", (0, 19, 0))
    assert read({"a": [1, None]}) == {"a": [1, None]}
    with pytest.raises(UserError, match="cannot be read:\n  - Weights only load failed"):
        read(Exploit(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


def test_stored_objects_are_plain_values_too(tmp_path):
    """None is in our checkpoints, but Megatron's format may hold some."""
    planner = _WeightsOnlyPlanner()
    planner.state_dict = {}
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="object"))
    for content, fine in (([1, {"a": None}], True), (Exploit(tmp_path / "ran"), False)):
        value = io.BytesIO()
        torch.save(content, value)
        value.seek(0)
        if fine:
            planner.load_bytes(item, value)
            assert planner.state_dict == {"object": content}
        else:
            with pytest.raises(pickle.UnpicklingError):
                planner.load_bytes(item, value)
    assert not (tmp_path / "ran").exists()

"""Save training checkpoints without holding up the training: copied to memory, written beside it, named at the end.

A save has three parts. `save` copies weights and optimizer to host memory and starts a thread that writes them
(every rank its share). `poll`, once a step, finds out whether all ranks have written; then the checkpoint is
completed: table of contents, checksums, synced to the disk, renamed, named by `latest`, old ones pruned. `finish`
waits for that.
Whatever happens before the rename, the checkpoint before this one is the newest. A fault of the file server that
passes is waited out where no rank talks to another: the snapshot is still in memory, to be written once more.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_prolong.convert.manifest import write_manifest
from megatron_prolong.errors import PassingError, UserError
from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.checkpoint import (
    SaveStrategy,
    Snapshot,
    state_bytes,
    take_snapshot,
    training_state,
)
from megatron_prolong.mcore.optimizer import MegatronOptimizer
from megatron_prolong.recipe.run_files import RESOLVED_RECIPE
from megatron_prolong.recipe.schema import CheckpointSpec
from megatron_prolong.recipe.shape import HF_DIR
from megatron_prolong.runtime.agreement import against_main, on_main, together
from megatron_prolong.runtime.checksums import CHECKSUMS, Entries, verify_checksums, write_checksums
from megatron_prolong.runtime.passing import patiently
from megatron_prolong.runtime.publish import is_disk_full, is_forbidden, no_room, publish
from megatron_prolong.training.run_directory import prune, remove_given_up, remove_unfinished, write_pointer

T = TypeVar("T")


@dataclass
class PendingSave:
    """A checkpoint between its snapshot and its name, being written by a thread of its own.

    Attributes:
        entries: checksums of this rank's files, when they are written.
        problem: what went wrong instead, for `CheckpointWriter` to raise.
    """

    snapshot: Snapshot
    manifest: dict[str, Any]
    num_bytes: int
    stall_seconds: float
    started: float
    entries: Entries = field(default_factory=dict)
    problem: UserError | None = None
    thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        # A daemon: a process that ends with an error does not wait for a checkpoint that cannot be completed.
        self.thread = Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        try:
            self.entries = patiently(
                self.snapshot.write, f"writing {self.snapshot.directory.with_suffix('')}"
            )
        except Exception as error:  # every rank has to hear of it, so it must not end the thread
            self.problem = _explained(error)


class CheckpointWriter:
    """Saves the checkpoints of one stage as RUN/STAGE/step_N. Every method but `writing` is collective.

    Args:
        stage_dir: RUN/STAGE.
        sidecar: the `hf/` directory that travels along.
        recipe: the resolved recipe as text, which travels along too.
        report: called on the main rank with the facts of every completed checkpoint.
    """

    def __init__(
        self,
        stage_dir: Path,
        spec: CheckpointSpec,
        sidecar: Path,
        recipe: str,
        report: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._stage_dir, self._spec, self._sidecar = stage_dir, spec, sidecar
        self._recipe, self._report = recipe, report
        self._pending: PendingSave | None = None
        self._strategy = SaveStrategy()

    def save(self, model: StageModel, optimizer: MegatronOptimizer, manifest: dict[str, Any]) -> None:
        """Begin to save; waits for the save before, and for this one unless `checkpoint.async_save`.

        Args:
            manifest: content of prolong.json, with `step`.

        Raises:
            UserError: not enough space, seen before anything is written, or anything that writing ran into.
        """
        self.finish()
        started = time.perf_counter()
        state = training_state(model, optimizer)
        num_bytes = _sum(state_bytes(state))
        partial = self._stage_dir / f"step_{manifest['step']:08d}.partial"
        _on_main(
            lambda: patiently(
                lambda: self._make_room(partial, num_bytes), f"saving {partial.with_suffix('')}"
            )
        )
        with _full_disks_explained(partial):
            snapshot = take_snapshot(partial, state, self._strategy)
        stall_seconds = time.perf_counter() - started
        self._pending = PendingSave(snapshot, manifest, num_bytes, stall_seconds, started)
        if not self._spec.async_save:
            self.finish()

    def writing(self) -> bool:
        """Whether this rank's share is still being written. Not collective."""
        return self._pending is not None and self._pending.thread.is_alive()

    def poll(self, writing: float) -> None:
        """Complete the pending save if every rank has written its share.

        Args:
            writing: how many ranks were `writing` when a step's loss was summed; so it takes no message of its own.
        """
        if writing == 0:
            self.finish()

    def reading(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; where no rank can read one, the pending save is completed before that is raised.

        A rank that fails alone raises at once: the others are about to wait for it in their step.
        """
        while True:
            problem: Exception | None = None
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (UserError, OSError) as error:
                problem = error
            if self._pending is not None and _sum(int(problem is not None)) == dist.get_world_size():
                self.finish()
            if problem is not None:
                raise problem
            yield batch

    def finish(self) -> None:
        """Wait for the pending save, if there is one, and complete it.

        Raises:
            UserError: it could not be written; nothing of it is left.
        """
        if (pending := self._pending) is None:
            return
        self._pending = None
        waiting = time.perf_counter()
        pending.thread.join()
        partial = pending.snapshot.directory
        shares: list[tuple[Entries, UserError | None]] = [({}, None)] * dist.get_world_size()
        dist.all_gather_object(shares, (pending.entries, pending.problem))
        if problems := [problem for _, problem in shares if problem]:
            _on_main(lambda: _give_up(partial, problems))
        with _full_disks_explained(partial):
            pending.snapshot.finish()
        entries = {name: entry for share, _ in shares for name, entry in share.items()}
        _on_main(lambda: self._complete(partial, pending.manifest, entries))
        if self._report:
            now = time.perf_counter()
            self._report(
                {
                    "stage": self._stage_dir.name,
                    "step": pending.manifest["step"],
                    "bytes": pending.num_bytes,
                    "seconds": now - pending.started,
                    "stall_seconds": pending.stall_seconds + now - waiting,
                }
            )

    def _make_room(self, partial: Path, num_bytes: int) -> None:
        remove_unfinished(self._stage_dir.parent)  # first of all: it may be what fills the disk
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < num_bytes:
            partial.rmdir()
            raise UserError(
                f"{partial.with_suffix('')} needs {num_bytes / 2**30:.1f} GiB, but the disk has {free / 2**30:.1f} "
                "GiB free; make room, or keep fewer checkpoints (checkpoint.keep, checkpoint.keep_every), and "
                "start again: the run continues from its newest checkpoint"
            )

    def _complete(self, partial: Path, manifest: dict[str, Any], entries: Entries) -> None:
        final = partial.with_suffix("")
        try:
            patiently(lambda: self._name(partial, final, manifest, entries), f"completing {final}")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _not_saved(partial, [_explained(error)]) from error
        try:
            prune(self._stage_dir, self._spec.keep, self._spec.keep_every)
        except OSError as error:  # this one is complete, whatever becomes of those before it
            print(
                f"warning: {self._stage_dir}: old checkpoints stay until the next one is saved: {error}",
                file=sys.stderr,
            )

    def _name(self, partial: Path, final: Path, manifest: dict[str, Any], entries: Entries) -> None:
        """Can be called again after it failed anywhere."""
        if partial.exists():  # or it has its name already
            _copy(self._sidecar, partial / HF_DIR)
            (partial / RESOLVED_RECIPE).write_text(self._recipe)
            write_manifest(partial, manifest)
            write_checksums(partial, entries)
            remove_given_up(self._stage_dir, final.name)
            publish(partial, final)
        write_pointer(self._stage_dir, final.name)


def verify_checkpoint(directory: Path) -> None:
    """Refuse a checkpoint with a changed, cut-off or missing file, or one that differs between nodes. Collective.

    The ranks share the reading. A checkpoint without checksums (of another program, or the converter's before it
    had them) is taken as it is.

    Raises:
        JointError: naming every damaged file.
    """
    sums = directory / CHECKSUMS
    content = sums.read_bytes() if sums.exists() else b""
    against_main(content, lambda main, own: _refuse_other_copy(directory, main, own))
    if sums.exists():
        share = slice(dist.get_rank(), None, dist.get_world_size())
        together(lambda: verify_checksums(directory, share))


def _refuse_other_copy(directory: Path, main: bytes, own: bytes) -> None:
    """A model may lie on each node's own disk; ranks that load an older copy would mix two models."""
    if own != main:
        raise UserError(f"{directory} is not what rank 0 has under this name; copy it to this node again")


def _copy(source: Path, target: Path) -> None:
    """A directory; shutil.copytree's error would not tell that the disk is full."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _give_up(partial: Path, problems: Sequence[UserError]) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # a disk that fails here too must not hide the problems
    raise _not_saved(partial, problems)


def _not_saved(partial: Path, problems: Sequence[UserError]) -> UserError:
    passing = all(isinstance(problem, PassingError) for problem in problems)
    title = f"{partial.with_suffix('')} could not be saved:"
    return (PassingError if passing else UserError).many(
        title, sorted({str(problem) for problem in problems})
    )


def _sum(number: int) -> int:
    """Over all ranks, through the CPU: nothing waits for the GPU."""
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def _on_main(action: Callable[[], object]) -> None:
    """Do it on rank 0; if that fails, the disk's fault included, every rank raises a UserError."""

    def explained() -> None:
        try:
            action()
        except OSError as error:
            raise _explained(error) from error

    on_main(explained)


@contextmanager
def _full_disks_explained(partial: Path) -> Iterator[None]:
    """For Megatron's own small files, which rank 0 writes between collectives."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise _not_saved(partial, [_explained(error)]) from error


def _explained(error: Exception) -> UserError:
    if why := no_room(error):
        return UserError(f"{why}; make room and start again: the run continues from its newest checkpoint")
    kind = UserError if is_forbidden(error) else PassingError
    return kind(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")

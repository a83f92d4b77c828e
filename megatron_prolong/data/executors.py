"""Where the tasks of a data job run: processes of this machine, a share of a Slurm array, or Ray.

A job is cut into tasks by its input alone, each task writes one directory atomically (data/job.py), so it
does not matter who runs which task, in which order, or how often it was tried.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.termination import terminable

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Run work(item) for every item and yield results as they come, in any order.

        work and items must be picklable. The first exception stops the job and is raised here.
        """
        ...


_KILLED = (
    "a worker process was killed, most often for lack of memory (after a crash, the place of it stands above); {}. "
    "Run the same command again: finished tasks are kept"
)


@dataclass(frozen=True)
class LocalProcesses:
    """`workers` processes on this machine; a single one, or a single item, runs in this process."""

    workers: int

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        if min(self.workers, len(items)) <= 1:
            yield from map(work, items)
            return
        with terminable():
            yield from self._pool(work, items)

    def _pool(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        others = set(multiprocessing.active_children())
        # spawn: forking a process in which the tokenizer's threads run can deadlock the child.
        pool = ProcessPoolExecutor(
            min(self.workers, len(items)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
        )
        try:
            with _ctrl_c_waits():
                futures = [pool.submit(work, item) for item in items]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(_KILLED.format("take fewer --workers")) from None
        except (KeyboardInterrupt, GeneratorExit):
            # A task under way may take minutes.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Workers started in here never see Ctrl-C, which a terminal sends to them too: this process ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    faulthandler.enable(2)
    _one_thread_each()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _one_thread_each() -> None:
    """Many processes, one thread each: the tokenizer's own thread pool would only fight over the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"


def _end_with_parent() -> None:
    """Without this, workers whose parent was killed would wait forever for its next task."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class Ray:
    """One Ray task per item, tried again elsewhere (Ray's default: three times) when its worker dies.

    address: the cluster's; None for the environment's, or a local one. All nodes must see the same files.
    """

    address: str | None = None

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        try:
            import ray
        except ImportError:
            raise UserError(
                "--executor ray needs the package ray: pip install 'megatron-prolong[ray]'"
            ) from None
        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False)
        remote = ray.remote(_run_here)
        pending = [remote.remote(str(Path.cwd()), work, item) for item in items]
        try:
            while pending:
                finished, pending = ray.wait(pending)
                yield from ray.get(finished)
        except ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except ray.exceptions.RayError as error:
            raise UserError(f"{_KILLED.format('give each task more')} ({type(error).__name__})") from None
        finally:
            for reference in pending:
                ray.cancel(reference)


def _run_here(directory: str, work: Callable[[T], R], item: T) -> R:
    """On any node: relative paths, and modules of the user's, are meant from where the command was given."""
    os.chdir(directory)
    _one_thread_each()
    return work(item)


def array_share(items: Sequence[T], environment: Mapping[str, str]) -> list[T]:
    """The items of this job of a Slurm array: every n-th, each job beginning at another.

    Array ids may begin anywhere and have a step, as in `--array=1-31:2`. A single one submitted again
    (`--array=7`) takes what is left, since finished tasks are never in `items`' way.
    Raises UserError when the variables are absent, and for a list of ids, whose jobs cannot know of each other.
    """
    try:
        task_id = int(environment["SLURM_ARRAY_TASK_ID"])
        count = int(environment["SLURM_ARRAY_TASK_COUNT"])
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", task_id))
        step = max(int(environment.get("SLURM_ARRAY_TASK_STEP", 1)), 1)
    except KeyError as error:
        raise UserError(
            f"--slurm-array: {error.args[0]} is not set; submit with `sbatch --array=0-31`"
        ) from None
    if (last - first) // step >= count:
        raise UserError(
            f"--slurm-array: {count} array ids from {first} to {last} are a list, not a range; submit "
            f"`--array=0-{count - 1}`: finished tasks are not done again"
        )
    return list(items[task_id // step % count :: count])

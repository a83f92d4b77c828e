"""A resumable job: named tasks that each write one data set, and a directory that appears when all are done.

While it runs the job lives in `OUT.partial`: `job.json` (what was asked for) and one finished directory per
task. Every task directory is written under a temporary name and renamed, so a job killed at any moment is
continued by running the same command again, by any number of processes or machines at once. When no task is
left, the indexes are merged, `report.json` is written and `OUT.partial` is renamed to `OUT`. The bytes of
`OUT` depend on what was asked for only: not on workers, stops, or machines.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from megatron_prolong.data.executors import Executor, array_share
from megatron_prolong.data.mds import INDEX, merge_indexes
from megatron_prolong.data.mds.writer import disk_full_is_users, refuse_existing
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.lock import LOCK
from megatron_prolong.runtime.progress import track
from megatron_prolong.runtime.publish import TEMPORARY, is_temporary, remove, sync, write_durably

T = TypeVar("T")
SETTINGS = "job.json"
REPORT = "report.json"


@dataclass(frozen=True)
class Job:
    """out: the final directory. directory: where the work happens, `OUT.partial`."""

    out: Path
    settings: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def is_finished(self) -> bool:
        return _read(self.out / SETTINGS) == dict(self.settings)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Begin, or continue what the same command began; an error before anything is done leaves nothing behind.

        Another process may finish the job meanwhile, and take its directory away from under a task: no error then.

        Raises UserError when OUT or OUT.partial holds something else, or OUT.partial was begun with other settings
        and has finished tasks, or a process that is at work there.
        """
        refuse_existing(self.out)
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / LOCK).open("a+") as lock:
            self._begin(lock)
            try:
                yield
            except (OSError, UserError) as error:
                if self.is_finished:
                    return
                if not self.directory.exists():
                    if not isinstance(error, FileNotFoundError):
                        raise
                    raise UserError(
                        f"{self.out}: another process of this job refused the result; see why there"
                    ) from None
                # Others may be at work that have nothing to show yet.
                alone = lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False
                if alone and not self._content(SETTINGS, LOCK):
                    remove(self.directory)
                raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what one process of this job does while the others wait; where there are no locks, they do not.

        Raises FileNotFoundError, which `open` explains, when another took the directory away meanwhile.
        """
        with (self.directory / SETTINGS).open("r+") as lock:  # NFS locks only what may be written
            if lock_file(lock, fcntl.LOCK_EX) is None:
                print(
                    f"warning: {lock.name}: no locks on this file system; going on without", file=sys.stderr
                )
            if not self.directory.exists():
                raise FileNotFoundError(self.directory)
            yield

    def _begin(self, lock: IO[str]) -> None:
        """Write the settings, or find the same. All that are at work share the lock; who has it alone may clear."""
        locked = lock_file(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if locked:  # then killed processes of this machine left these; other machines may not see the lock
            for path in list(self.directory.rglob(f"*{TEMPORARY}{socket.gethostname()}-*")):
                _delete(path)
        alone = locked is not False
        if not alone:
            lock_file(lock, fcntl.LOCK_SH)
        begun = self._begun()
        if begun is not None and begun != dict(self.settings):
            if not alone:
                self._refuse(begun, "is in use by a process with other settings; wait, or choose another OUT")
            if any(self.directory.rglob(INDEX)):
                self._refuse(begun, "was begun with other settings; remove it to start anew, or repeat them")
            for path in self._content(LOCK):
                _delete(path)
            begun = None
        if begun is None:  # once, as it is the file that `finish` locks
            with disk_full_is_users(self.out):
                write_json(self.directory / SETTINGS, dict(self.settings))
        lock_file(lock, fcntl.LOCK_SH)

    def _begun(self) -> dict[str, Any] | None:
        """The settings that are there. Raises UserError for a directory of the user's: its files would go when the
        job ends."""
        paths = self.directory.glob("[!.]*")
        names = [path.name for path in paths if not is_temporary(path, self.directory)]
        begun = _read(self.directory / SETTINGS)
        if begun is None and names and SETTINGS not in names:  # else another process took it away just now
            raise UserError(
                f"{self.directory}: {min(names)} in it is of no job, and would be deleted; move it away, or choose "
                "another OUT"
            )
        return begun

    def _content(self, *but: str) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.name not in but]

    def _refuse(self, begun: Mapping[str, Any], why: str) -> NoReturn:
        keys = sorted(begun.keys() | self.settings.keys())
        changed = [key for key in keys if begun.get(key) != self.settings.get(key)]
        raise UserError.many(
            f"{self.directory} {why}:",
            [f"{key}: was {begun.get(key)!s:.100}, now {self.settings.get(key)!s:.100}" for key in changed],
        )

    def run(
        self,
        tasks: Mapping[str, T],
        work: Callable[[Path, T], None],
        executor: Executor,
        environment: Mapping[str, str] | None = None,
    ) -> bool:
        """Run work(directory, description) for the tasks not done yet; True when none is left anywhere.

        tasks: directory below `directory` to description of the task. work must create that directory
        atomically (MDSWriter does). environment: Slurm's variables, to take only this array job's share.
        """
        if self.is_finished:  # since this process looked, which has begun `directory` anew
            return True
        share = list(tasks) if environment is None else array_share(list(tasks), environment)
        pending = [(self.directory / name, tasks[name]) for name in share if not self._is_done(name)]
        done = executor.map(partial(_run_once, work), pending)
        for _ in track(done, len(pending), f"{self.out.name}: tasks"):
            pass
        return all(map(self._is_done, tasks))

    def _is_done(self, task: str) -> bool:
        return (self.directory / task / INDEX).exists()

    def task_reports(self, tasks: Iterable[str]) -> list[dict[str, Any]]:
        """What every finished task wrote as its report.json, in the order of the tasks."""
        reports = [_read(self.directory / task / REPORT) for task in tasks]
        assert None not in reports, "a task wrote no report"
        return [report for report in reports if report is not None]

    def report(self) -> dict[str, Any]:
        """What `finish` wrote as the report."""
        content: dict[str, Any] = json.loads((self.out / REPORT).read_bytes())
        return content

    def finish(self, tasks: Iterable[str], report: Callable[[], Mapping[str, Any]]) -> None:
        """Merge the indexes, write the report, give the directory its final name.

        A UserError of `report` refuses the result: other inputs or settings are needed, so none of it is kept.
        Several jobs of an array may come here at once: one does it, the others find it done.
        """
        with self.alone():
            if self.is_finished:
                remove(self.directory)
                return
            try:
                account = report()
            except UserError:
                remove(self.directory)
                raise
            with disk_full_is_users(self.out):
                self._assemble(tasks, account)
            self.directory.replace(self.out)
            sync(self.out.parent)  # else a power cut may undo the renaming
            (self.out / LOCK).unlink(missing_ok=True)

    def _assemble(self, tasks: Iterable[str], report: Mapping[str, Any]) -> None:
        parents = sorted({str(Path(task).parent) for task in tasks})
        for parent in parents:
            members = [self.directory / task for task in tasks if str(Path(task).parent) == parent]
            merge_indexes(members, self.directory / parent)
        # Without LOCK, who comes now would have one to itself, and clear away what is being written here.
        keep = {Path(task).parts[0] for task in tasks} | {SETTINGS, INDEX, LOCK}
        for path in self._content(*keep):  # plans, and temporary directories of killed workers
            _delete(path)
        for parent in parents:
            for path in (self.directory / parent).glob("*.tmp-*"):
                _delete(path)
        write_json(self.directory / REPORT, report)


def _delete(path: Path) -> None:
    """A process that is late with the same task may be cleaning up there too."""
    while path.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_file(file: IO[Any], operation: int) -> bool | None:
    """Take a lock; False if it is held and not to be waited for. None on file systems without any (Lustre without
    -o flock): there two jobs that finish at the same moment may get in each other's way, so that one ends with an
    error; what they write is the same.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        return None
    return True


def _run_once(work: Callable[[Path, T], None], task: tuple[Path, T]) -> None:
    """Another process may have done the task since the list was made, or finish it first: both are good."""
    directory, description = task
    try:
        if not (directory / INDEX).exists():
            work(directory, description)
    except (OSError, UserError):
        if not (directory / INDEX).exists():
            raise


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; remove {path.parent} and start anew") from None
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file that a reader never sees half of."""
    write_durably(path, json.dumps(value, indent=2, sort_keys=True) + "\n")

"""A job that several processes continue at once, on any file system."""

from __future__ import annotations

import errno
import fcntl
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from megatron_prolong.data import job as job_module
from megatron_prolong.data.executors import LocalProcesses
from megatron_prolong.data.job import Job
from megatron_prolong.data.mds import MDSReader, MDSWriter
from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import remove


def write(directory: Path, value: int) -> None:
    with MDSWriter(directory, {"input_ids": "ndarray:uint32"}) as writer:
        writer.write({"input_ids": np.full(3, value, np.uint32)})


def test_finishing_takes_a_lock_that_nfs_grants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS makes flock a lock of bytes, which is exclusive only on a file that is open for writing (flock(2))."""

    def flock(file: IO[str], operation: int) -> None:
        if operation & fcntl.LOCK_EX and not file.writable():
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(job_module.fcntl, "flock", flock)
    job = Job(tmp_path / "out", {"step": "test"})
    with job.open():
        write(job.directory / "00000", 1)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert len(MDSReader(tmp_path / "out")) == 1 and job.is_finished


def test_who_joins_a_job_leaves_the_file_that_others_lock(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", {"step": "test"})
    settings = job.directory / job_module.SETTINGS
    with job.open(), settings.open() as held:  # so that the number cannot be given to another file
        before = settings.stat().st_ino
        with Job(tmp_path / "out", {"step": "test"}).open():
            assert settings.stat().st_ino == before, held


def test_those_that_begin_together_write_the_settings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would lock the file that another replaces."""
    written: list[Path] = []
    write_json = job_module.write_json

    def slowly(path: Path, value: dict[str, str]) -> None:
        time.sleep(0.1)
        write_json(path, value)
        written.append(path)

    def begin(_: int) -> None:
        with Job(tmp_path / "out", {"step": "test"}).open():
            begun.wait(60)

    begun = threading.Barrier(3)
    monkeypatch.setattr(job_module, "write_json", slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(begin, range(3)))
    assert len(written) == 1


def test_other_settings_are_refused_while_a_process_is_at_work(tmp_path: Path) -> None:
    """Else they would take its directory away, as long as it has no task done."""
    first, second = (Job(tmp_path / "out", {"length": length}) for length in (8, 16))
    with first.open():
        with pytest.raises(
            UserError, match=r"in use by a process with other settings.*\n  - length: was 8, now 16"
        ):
            second.open().__enter__()
        with Job(tmp_path / "out", {"length": 8}).open():
            write(first.directory / "00000", 1)
        first.finish(["00000"], lambda: {"tokens": 3})
    assert first.is_finished and not (first.out / ".lock").exists()


def test_who_comes_as_a_job_is_finished_leaves_no_lock_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would depend on how many processes there were."""
    job, write_json = Job(tmp_path / "out", {"step": "test"}), job_module.write_json

    def then_another_comes(path: Path, value: dict[str, int]) -> None:
        write_json(path, value)
        (path.parent / ".lock").touch()

    with job.open():
        write(job.directory / "00000", 1)
        monkeypatch.setattr(job_module, "write_json", then_another_comes)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert job.is_finished and not (job.out / ".lock").exists()


def test_who_comes_as_a_job_is_finished_clears_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only killed processes leave temporary files, and one that finishes is none."""
    job, write_json = Job(tmp_path / "out", {"step": "test"}), job_module.write_json

    def meanwhile(path: Path, value: object) -> None:
        if path.name == job_module.REPORT:
            temporary = path.with_name(f"{path.name}.tmp-prolong-{socket.gethostname()}-1")
            temporary.write_text("as far as this")
            with Job(tmp_path / "out", {"step": "test"}).open():
                assert temporary.exists()
            temporary.unlink()
        write_json(path, value)

    with job.open():
        write(job.directory / "00000", 1)
        monkeypatch.setattr(job_module, "write_json", meanwhile)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert job.is_finished and not (job.out / job_module.LOCK).exists()


def test_a_directory_of_the_user_s_that_is_named_like_a_job_s_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").touch()
    with (
        pytest.raises(UserError, match=r"out\.partial: notes in it is of no job"),
        Job(tmp_path / "out", {}).open(),
    ):
        raise AssertionError("begun")
    assert (tmp_path / "out.partial" / "notes").exists()


def test_what_a_killed_process_began_gives_way_to_other_settings(tmp_path: Path) -> None:
    killed, job = (Job(tmp_path / "out", {"length": length}) for length in (8, 16))
    with killed.open():
        (killed.directory / "plan").mkdir()
        write(killed.directory / f"00000.tmp-prolong-{socket.gethostname()}-1", 1)  # whole, but not renamed
    with job.open():
        assert not (job.directory / "plan").exists()
        write(job.directory / "00000", 1)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert job.is_finished


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: int
) -> None:
    """Lustre without -o flock, NFS without lockd. Another error is not taken for that."""

    def flock(file: IO[str], operation: int) -> None:
        raise OSError(reason, "no")

    monkeypatch.setattr(job_module.fcntl, "flock", flock)
    job = Job(tmp_path / "out", {"step": "test"})
    if reason == errno.EIO:
        with pytest.raises(OSError, match="no"):
            job.open().__enter__()
        return
    with job.open():
        write(job.directory / "00000", 1)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert len(MDSReader(tmp_path / "out")) == 1 and job.is_finished
    assert "job.json: no locks on this file system" in capsys.readouterr().err


def test_a_refused_result_and_a_failed_beginning_leave_nothing(tmp_path: Path) -> None:
    def refuse() -> dict[str, int]:
        raise UserError("not one document is left")

    job = Job(tmp_path / "out", {"step": "test"})
    with pytest.raises(UserError, match="not one document"), job.open():
        write(job.directory / "00000", 1)
        job.finish(["00000"], refuse)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="bad record"), job.open():
        raise UserError("bad record")
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="bad record"), job.open():
        write(job.directory / "00000", 1)
        raise UserError("bad record")
    with job.open():  # what is done is kept
        assert (job.directory / "00000" / "index.json").exists()


def test_an_error_takes_nothing_away_from_others_that_have_just_begun(tmp_path: Path) -> None:
    """Looking for duplicates takes an hour in which there is nothing to see; its result found no directory then."""
    job = Job(tmp_path / "out", {"step": "test"})
    with job.open():
        with pytest.raises(UserError, match="bad record"), Job(tmp_path / "out", {"step": "test"}).open():
            raise UserError("bad record")
        write(job.directory / "00000", 1)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert job.is_finished


def test_what_killed_workers_left_vanishes(tmp_path: Path) -> None:
    job = Job(tmp_path / "new" / "out", {"step": "test"})
    with job.open():
        write(job.directory / "8-16" / "00000", 1)
        (job.directory / "8-16" / "00001.tmp-1").mkdir()
        (job.directory / "plan").touch()
        job.finish(["8-16/00000"], lambda: {"tokens": 3})
    found = {str(path.relative_to(job.out)) for path in job.out.rglob("*") if path.suffix != ".json"}
    assert found == {"8-16", "8-16/00000", "8-16/00000/shard.00000.mds"}


def test_what_killed_workers_left_does_not_pile_up(tmp_path: Path) -> None:
    """A job that is preempted every hour had each time as much more as its workers were at."""
    job, again = (Job(tmp_path / "out", {"step": "test"}) for _ in range(2))
    here, elsewhere = f"00001.tmp-prolong-{socket.gethostname()}-1", "00001.tmp-prolong-elsewhere-1"
    with job.open():
        for name in (here, f"8-16/{here}", elsewhere):
            write(job.directory / "killed", 1)
            (job.directory / name).parent.mkdir(exist_ok=True)
            (job.directory / "killed").rename(job.directory / name)
        with again.open():  # which is not alone
            assert len(list(job.directory.rglob("*.tmp-*"))) == 3
    with again.open():
        assert [path.name for path in job.directory.rglob("*.tmp-*")] == [elsewhere]


def test_leftovers_that_somebody_else_deletes_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a slower process does, which finds that its task was done by another one."""

    def too_late(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        raise FileNotFoundError(path.name)

    job = Job(tmp_path / "out", {"step": "test"})
    with job.open():
        write(job.directory / "00000", 1)
        write(job.directory / "00000.tmp-slower", 1)
        monkeypatch.setattr("shutil.rmtree", too_late)
        job.finish(["00000"], lambda: {"tokens": 3})
    assert job.is_finished and not list(job.out.glob("*.tmp-*"))


def test_a_job_that_another_one_finished_is_finished(tmp_path: Path) -> None:
    first, second = (Job(tmp_path / "out", {"step": "test"}) for _ in range(2))
    with first.open(), second.open():
        write(first.directory / "00000", 1)
        for job in (first, second):
            job.finish(["00000"], lambda: {"tokens": 3})
    assert second.is_finished and len(MDSReader(tmp_path / "out")) == 1


def test_who_is_late_does_not_begin_a_finished_job_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did its share again, and left OUT.partial behind for ever."""
    job, refuse_existing = Job(tmp_path / "out", {"step": "test"}), job_module.refuse_existing

    def finish_meanwhile(path: Path) -> None:
        refuse_existing(path)
        monkeypatch.setattr(job_module, "refuse_existing", refuse_existing)
        with job.open():
            write(job.directory / "00000", 1)
            job.finish(["00000"], lambda: {"tokens": 3})

    def do_again(directory: Path, value: int) -> None:
        raise AssertionError(f"{directory} is done")

    monkeypatch.setattr(job_module, "refuse_existing", finish_meanwhile)
    with job.open():
        assert job.run({"00000": 2}, do_again, LocalProcesses(1))
        job.finish(["00000"], lambda: {"tokens": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert MDSReader(tmp_path / "out")[0]["input_ids"].tolist() == [1, 1, 1]


def test_a_result_that_another_one_refused_is_no_traceback(tmp_path: Path) -> None:
    def refuse() -> dict[str, int]:
        raise UserError("not one document")

    job = Job(tmp_path / "out", {"step": "test"})
    for said in ("not one document", "another process of this job refused the result"):
        with pytest.raises(UserError, match=said), job.open():
            write(job.directory / "00000", 1)
            if said != "not one document":
                remove(job.directory)
            job.finish(["00000"], refuse)
    assert not job.directory.exists()


def test_who_waited_for_one_that_refused_does_not_begin_anew(tmp_path: Path) -> None:
    job, other = (Job(tmp_path / "out", {"step": "test"}) for _ in range(2))
    begun = threading.Event()

    def wait_and_begin() -> None:
        with other.open():
            begun.set()
            with other.alone():
                raise AssertionError("its directory is gone")

    with job.open(), ThreadPoolExecutor(1) as pool:
        with job.alone():
            waiting = pool.submit(wait_and_begin)
            assert begun.wait(60)
            time.sleep(0.05)  # so that it comes to the lock
            remove(job.directory)
        with pytest.raises(UserError, match="another process of this job refused the result"):
            waiting.result()


def test_a_task_that_another_process_finished_with_the_job_is_no_error(tmp_path: Path) -> None:
    """Two times the same command, at the last task together: its directory is gone when the slower one looks."""
    job = Job(tmp_path / "out", {"step": "test"})

    def be_late(directory: Path, value: int) -> None:
        write(directory, value)
        job.finish(["00000"], lambda: {"tokens": 3})
        directory.with_name("00000.tmp-of-the-slower-one").replace(directory)

    with job.open():
        job.run({"00000": 1}, be_late, LocalProcesses(1))
    assert job.is_finished and len(MDSReader(tmp_path / "out")) == 1

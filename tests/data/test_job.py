"""A job that several processes continue at once, on any file system."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from megatron_prolong.data import job as job_module
from megatron_prolong.data.job import Job
from megatron_prolong.data.mds import MDSReader, MDSWriter


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
    job.open()
    write(job.directory / "00000", 1)
    job.finish(["00000"], lambda: {"tokens": 3})
    assert len(MDSReader(tmp_path / "out")) == 1 and job.is_finished


def test_who_joins_a_job_leaves_the_file_that_others_lock(tmp_path: Path) -> None:
    job = Job(tmp_path / "out", {"step": "test"})
    job.open()
    settings = job.directory / job_module.SETTINGS
    before = settings.stat().st_ino
    with settings.open() as held:  # so that the number cannot be given to another file
        Job(tmp_path / "out", {"step": "test"}).open()
        assert settings.stat().st_ino == before, held

"""Output directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_prolong.errors import UserError


@contextlib.contextmanager
def staged_directory(final: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty directory to write into; named `final` when the block ends well, removed when it does not.

    Args:
        needed_bytes: space the content takes; checked against the disk before anything is written.

    Raises:
        UserError: `final` exists, its parent cannot be written, or the disk is or becomes full.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final}: already exists; choose another name or remove it")
    partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < needed_bytes:
            raise UserError(
                f"{final}: needs {needed_bytes / 2**30:.1f} GiB, but the disk has {free / 2**30:.1f} GiB free"
            )
        partial.mkdir()
        yield partial
        _sync(partial)
        if final.exists():
            final.rmdir()
        partial.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{final}: the disk is full; nothing was kept") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{final}: cannot be written: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Push everything to the disk, so that the rename can only expose complete content."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Files and directories appear under their name only when complete on disk; what a killed process left is removed.

Until then they are called `NAME.tmp-prolong-HOST-PID`, so that leftovers can be told from work in progress and from
files of the user's. The host is in it because ranks of several machines unpack the same shard on a shared disk, and
containers number their processes alike.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

from megatron_prolong.errors import UserError

TEMPORARY = ".tmp-prolong-"


def temporary_name(final: Path) -> Path:
    """Where this process writes what will be named `final`."""
    return final.with_name(f"{final.name}{TEMPORARY}{socket.gethostname()}-{os.getpid()}")


def is_url(path: Path) -> bool:
    """Whether it was written as s3://…, gs://…, of which pathlib makes the relative directory `s3:`."""
    return re.match(r"\w+:/", str(path)) is not None


def refuse_url(path: Path) -> None:
    """Raises UserError for a place to write to that is none on a disk."""
    if is_url(path):
        raise UserError(
            f"{path}: is the address of a server; results are written to a disk, so name a directory there and "
            "copy it afterwards (aws s3 sync, …)"
        )


def wanted_name(path: str) -> str:
    """`path` with final names in place of temporary ones, for messages."""
    return re.sub(rf"{re.escape(TEMPORARY)}[^/]+-\d+(?=/|$)", "", path)


def is_temporary(path: Path, root: Path) -> bool:
    """Whether `path` is, or lies in, something unfinished below `root`: being made, or left by a killed process."""
    below = path.relative_to(root).as_posix()
    return wanted_name(below) != below


def publish(partial: Path, final: Path) -> None:
    """Push `partial`, a file or a directory, to the disk and name it `final`: a file or an empty directory of that
    name is replaced. A power cut at any moment leaves all of it, or nothing under that name.
    """
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    partial.replace(final)
    sync(final.parent)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A name to write a file to: published as `final` when the block ends well, removed when it does not.

    The directories above it are made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    try:
        yield temporary
        publish(temporary, final)
    except OSError as error:
        if is_disk_full(error) and error.filename is None:  # a failed write does not say of which file
            error.filename = str(final)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file: a crash at any moment leaves the old or the new content."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(directory: Path) -> None:
    """Rename a directory, then delete it, so that it is never half there under its name.

    Files that somebody still reads over NFS cannot be deleted yet: `remove_leftovers` of a later process does it.
    """
    doomed = temporary_name(directory.with_name(f"{directory.name}.removed"))
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, name: str = "*") -> None:
    """Delete what is unfinished in `parent`, except what a living process of this machine is making.

    Another machine's processes cannot be seen from here: only call it where none can be at work on the same name.
    """
    for path in parent.glob(f"{name}{TEMPORARY}*"):
        found = re.fullmatch(rf".*{re.escape(TEMPORARY)}(.+)-(\d+)", path.name)
        if found is None or is_alive_here(found[1], int(found[2])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "no file may become so large here (see `ulimit -f`)",
}


def no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, if that is behind an error, or behind what it was raised from: when
    a write fails, torch.save stumbles over its own half-written file and raises an error about that.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return _NO_ROOM[error.errno]
        error = error.__cause__ or error.__context__
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `no_room` is behind an error."""
    return no_room(error) is not None


def is_forbidden(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error says that something may not be written, which will not pass by itself."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def is_alive_here(host: str, pid: int) -> bool:
    """Whether this machine is `host` and has such a process."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def sync(path: Path) -> None:
    """What was written into a file, or renamed in a directory, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Output directories that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.publish import (
    is_forbidden,
    no_room,
    publish,
    refuse_url,
    remove_leftovers,
    temporary_name,
)


@contextlib.contextmanager
def staged_directory(final: Path, needed_bytes: int) -> Iterator[Path]:
    """An empty directory to write into; named `final` when the block ends well, removed when it does not,
    with the parents made for it.

    What an earlier attempt left that could not clean up (kill -9) is removed first.

    Args:
        needed_bytes: space the content takes; checked against the disk before anything is written.

    Raises:
        UserError: `final` exists or is a server's address, its parent is a file or cannot be written, or the disk
            is or becomes full.
    """
    refuse_url(final)
    # A link cannot be replaced by a directory, not even one to nothing; nor can `.`, which has no name.
    if (
        final.is_symlink()
        or not final.name
        or (final.exists() and (not final.is_dir() or any(final.iterdir())))
    ):
        raise UserError(f"{final}: already exists; choose another name or remove it")
    for parent in final.parents:
        if (parent.exists() or parent.is_symlink()) and not parent.is_dir():
            raise UserError(f"{final}: {parent} is no directory; choose another place")
    partial = temporary_name(final)
    new_parents = [parent for parent in final.parents if not parent.exists()]  # the innermost first
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(final.parent, glob.escape(final.name))
        shutil.rmtree(partial, ignore_errors=True)  # a restarted container numbers its processes alike
        free = shutil.disk_usage(final.parent).free
        if free < needed_bytes:
            raise UserError(f"{final}: needs {needed_bytes:,} bytes, but the disk has {free:,} free")
        partial.mkdir()
        yield partial
        publish(partial, final)
    except (OSError, RuntimeError) as error:
        if why := no_room(error):
            raise UserError(f"{final}: {why}; nothing was kept") from error
        # Once there is a place to write into, what is forbidden is to read a file of the source.
        if is_forbidden(error) and not partial.exists():
            raise UserError(f"{final}: cannot be written: {error.strerror}") from error
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{final}: another process has made it meanwhile; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # they are not empty when the block ended well
            for parent in new_parents:
                parent.rmdir()

"""Reading bytes at an offset straight into a tensor: plain pread, safe from many threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.open_files import allow_open_files


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The error of a bad disk or of a file server does not say which file it was."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


class PositionedFiles:
    """Files opened on first use and read at offsets, until `close`."""

    def __init__(self) -> None:
        allow_open_files()  # a checkpoint has one from every rank
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, out: Tensor) -> None:
        """Fill contiguous `out` with the bytes of `path` from `offset` on.

        Raises:
            UserError: the file is missing, ends too early, or cannot be read.
        """
        view = tensor_bytes(out)
        done = 0
        while done < len(view):
            with _naming(path):
                count = os.preadv(self._descriptor(path), [view[done:]], offset + done)
            if count == 0:
                raise UserError(
                    f"{path}: truncated; {len(view) - done} more bytes expected at {offset + done}"
                )
            done += count

    def read(self, path: Path, offset: int, count: int) -> bytes:
        """`count` bytes of `path` from `offset` on; raises UserError like `read_into`."""
        with _naming(path):
            content = os.pread(self._descriptor(path), count, offset)
        if len(content) < count:
            raise UserError(f"{path}: truncated; {count} bytes expected at {offset}, {len(content)} found")
        return content

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except FileNotFoundError as error:
                    raise UserError(f"{path}: no such file; the checkpoint is incomplete") from error
            return self._descriptors[path]

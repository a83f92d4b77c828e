"""Where the raw bytes of a tensor lie in the zip that torch.save wrote, found without torch.load.

The zip holds `data.pkl` (dtype, size, stride, which storage) and `data/0` (the storage, uncompressed), each with
its CRC-32: the bytes are read once to compare it, and what is read of them afterwards is in the page cache.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import zipfile
from pathlib import Path

import torch

from megatron_prolong.convert.positioned import PositionedFiles
from megatron_prolong.convert.unpickle import SafeUnpickler, saved_entries
from megatron_prolong.errors import UserError

_PIECE_BYTES = 2**20
_STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16}


def locate_tensor(
    files: PositionedFiles, path: Path, offset: int, length: int, dtype: torch.dtype, numel: int
) -> int:
    """The offset in `path` of the first byte of a contiguous tensor saved at `offset` … `offset + length`.

    Raises:
        UserError: something else is stored there, or the file is damaged.
    """
    where = f"{path} at byte {offset}"
    try:
        view = _FileView(files, path, offset, length)
        with zipfile.ZipFile(view) as archive:
            entries = saved_entries(archive)
            saved = SafeUnpickler(archive.open(entries["data.pkl"])).load()
            storage, first, size, stride = saved.args[:4]
            _, storage_type, storage_name, *_ = storage.args[0]
            data = entries[f"data/{storage_name}"]
            with archive.open(data) as content:
                while content.read(_PIECE_BYTES):  # raises at the end when the CRC-32 is another
                    pass
            byteorder = archive.read(entries["byteorder"]).decode() if "byteorder" in entries else "little"
        found = _STORAGES.get(storage_type.__name__)
        if found != dtype or math.prod(size) != numel:
            raise UserError(f"{where}: {storage_type.__name__} of size {list(size)}, not what .metadata says")
        if (
            byteorder != sys.byteorder
            or data.compress_type != zipfile.ZIP_STORED
            or not _contiguous(size, stride)
        ):
            raise UserError(
                f"{where}: stored with another byte order or stride, or compressed: cannot be read here"
            )
        name_length, extra_length = struct.unpack(
            "<HH", files.read(path, offset + data.header_offset + 26, 4)
        )
    except UserError:
        raise
    except Exception as error:  # a damaged zip or pickle can fail in any way
        raise UserError(f"{where}: damaged, copy it again ({type(error).__name__}: {error})") from error
    return offset + data.header_offset + 30 + name_length + extra_length + first * dtype.itemsize


class _FileView(io.RawIOBase):
    """Bytes `offset` … `offset + length` of a file as a file of its own, for zipfile."""

    def __init__(self, files: PositionedFiles, path: Path, offset: int, length: int) -> None:
        self._files, self._path, self._offset, self._length, self._position = files, path, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        )
        if self._position < 0:
            raise OSError("seek before the start")
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        content = self._files.read(self._path, self._offset + self._position, count)
        self._position += count
        return content


def _contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True

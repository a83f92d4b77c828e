"""Tensors inside what torch.save wrote: found where they lie, or refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_prolong.convert.positioned import PositionedFiles
from megatron_prolong.convert.saved_tensor import locate_tensor
from megatron_prolong.errors import UserError


def _read(path: Path, wanted: Tensor, before: int = 0) -> Tensor:
    """A tensor like `wanted`, read from where a zip `before` bytes into the file is said to hold it."""
    files = PositionedFiles()
    length = path.stat().st_size - before
    found = torch.empty(wanted.shape, dtype=wanted.dtype)
    try:
        start = locate_tensor(files, path, before, length, wanted.dtype, wanted.numel())
        files.read_into(path, start, found)
    finally:
        files.close()
    return found


def _matrix() -> Tensor:
    return torch.arange(40, dtype=torch.bfloat16).view(8, 5)


@pytest.mark.parametrize(
    "tensor",
    [_matrix(), _matrix()[3:], _matrix()[:1].T, _matrix()[2, 2:]],
    ids=["whole", "rows", "one", "end"],
)
def test_rows_of_a_larger_storage_are_found(tensor: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(b"something else")
        torch.save(tensor, file)
    assert torch.equal(_read(path, tensor, before=14), tensor)


@pytest.mark.parametrize("saved", [_matrix().T, _matrix()[:, :4]], ids=["transposed", "columns"])
def test_rows_that_are_not_one_after_the_other_are_refused(saved: Tensor, tmp_path: Path) -> None:
    """Read as they lie, they would be another tensor of the same size."""
    torch.save(saved, tmp_path / "file")
    with pytest.raises(UserError, match="stored with another byte order or stride"):
        _read(tmp_path / "file", saved)


@pytest.mark.parametrize("wanted", [_matrix().half(), _matrix()[1:]], ids=["dtype", "size"])
def test_what_is_not_as_announced_is_refused(wanted: Tensor, tmp_path: Path) -> None:
    torch.save(_matrix(), tmp_path / "file")
    with pytest.raises(UserError, match=r"BFloat16Storage of size \[8, 5\], not what .metadata says"):
        _read(tmp_path / "file", wanted)


@pytest.mark.parametrize("change", ["compressed", "big-endian"])
def test_bytes_that_are_not_the_numbers_are_refused(change: str, tmp_path: Path) -> None:
    torch.save(_matrix(), tmp_path / "saved")
    method = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(tmp_path / "saved") as saved,
        zipfile.ZipFile(tmp_path / "file", "w", method) as file,
    ):
        for name in saved.namelist():
            content = saved.read(name)
            if change == "big-endian" and name.endswith("byteorder"):
                content = b"big"
            file.writestr(name, content)
    with pytest.raises(UserError, match="another byte order or stride, or compressed"):
        _read(tmp_path / "file", _matrix())

"""Files read at offsets."""

from __future__ import annotations

import resource
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_prolong.convert.positioned import PositionedFiles
from megatron_prolong.errors import UserError


def test_a_checkpoint_may_have_more_files_than_a_shell_allows_open(tmp_path: Path) -> None:
    """One of every rank: converting one of 1,024 ranks ended with "Too many open files"."""
    paths = [tmp_path / f"__{rank}_0.distcp" for rank in range(200)]
    for path in paths:
        path.write_text(path.name)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    files = PositionedFiles()
    try:
        assert [files.read(path, 2, 3) for path in paths] == [path.name[2:5].encode() for path in paths]
    finally:
        files.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """As on a bad disk or a file server; a directory is opened too, and only then not read."""
    with closing(PositionedFiles()) as files:
        for read in (partial(files.read, count=1), partial(files.read_into, out=torch.empty(1))):
            with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read \\(Is a directory"):
                read(tmp_path, 0)

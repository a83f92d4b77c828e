"""What a process of a job is allowed, before it looks for the others."""

import resource

import pytest
import torch.distributed as dist

from megatron_prolong.errors import UserError
from megatron_prolong.runtime.launch import distributed


def test_all_open_files_that_are_permitted_are_used_and_too_few_are_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 40, PyTorch ends with a traceback of its own; with 16 it waits for ever."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    with distributed():
        assert asked == [(4096, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(UserError, match="may open 40 files here; training takes at least 512"), distributed():
        pass


def test_an_error_of_a_process_alone_leaves_no_process_group() -> None:
    with pytest.raises(UserError, match="mine"), distributed():
        raise UserError("mine")
    assert not dist.is_initialized()

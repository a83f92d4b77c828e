"""FlashAttention-3 under PyTorch's operators. On GPUs that have it, tests/gpu attends with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import attention

from megatron_prolong.errors import UserError
from megatron_prolong.runtime import flash_attention_3
from megatron_prolong.runtime.flash_attention_3 import use_flash_attention_3

KERNELS = """
import torch
library = torch.library.Library("flash_attn_3", "FRAGMENT")
for name in ("fwd", "bwd"):
    library.define(name + "(Tensor q) -> Tensor")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where `flash_attn_interface` would be, and a Hopper GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    yield tmp_path / "flash_attn_interface.py"
    attention.restore_flash_attention_impl(_raise_warn=False)
    sys.modules.pop("flash_attn_interface", None)


def test_it_takes_the_place_of_pytorchs_kernels_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(flash_attention_3, "_attend", lambda: tried.append("a token"))
    package.write_text(KERNELS)
    for _ in range(2):  # a program's second model
        use_flash_attention_3()
    assert attention.current_flash_attention_impl() == "FA3" and tried == ["a token"]


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_other_gpus_keep_pytorchs_kernels(package: Path, monkeypatch: pytest.MonkeyPatch, capability) -> None:
    package.write_text("raise AssertionError('imported')")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    use_flash_attention_3()
    assert attention.current_flash_attention_impl() is None


def test_without_the_package_nothing_changes(package: Path) -> None:
    use_flash_attention_3()
    assert attention.current_flash_attention_impl() is None


def test_one_that_was_built_for_another_pytorch_is_refused(package: Path) -> None:
    package.write_text("raise ImportError('undefined symbol: _ZN3c104cuda9SetDeviceEa')")
    with pytest.raises(UserError, match=r"flash-attn-3 is installed.*undefined symbol.*pip install"):
        use_flash_attention_3()


def test_one_that_does_not_run_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend() -> None:
        raise RuntimeError(
            "max_seqlen_q must be provided if cu_seqlens_q is provided\nException raised from …"
        )

    monkeypatch.setattr(flash_attention_3, "_attend", attend)
    package.write_text(KERNELS)
    with pytest.raises(
        UserError, match=r"cannot use it: max_seqlen_q must be provided if cu_seqlens_q is provided;"
    ):
        use_flash_attention_3()

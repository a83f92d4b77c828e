"""PyTorch's switch to kernels that always add in the same order."""

import pytest
import torch

from megatron_prolong.runtime.determinism import deterministic_kernels


def use_another_kernel() -> None:
    """An operation that PyTorch has no deterministic kernel for, on a CPU neither."""
    torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))


def test_inside_other_kernels_are_refused_and_afterwards_no_more():
    with pytest.raises(RuntimeError, match="deterministic"), deterministic_kernels(True):
        use_another_kernel()
    use_another_kernel()


def test_not_wanted_it_changes_nothing():
    with deterministic_kernels(False):
        use_another_kernel()
    with deterministic_kernels(True):
        with deterministic_kernels(False):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()

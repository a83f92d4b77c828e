"""A GPU whose memory is full: PyTorch's own errors, raised here by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_prolong.errors import PassingError
from megatron_prolong.runtime.full_gpu import naming_a_full_gpu

PYTORCH_SAYS = (  # c10/cuda/CUDACachingAllocator.cpp
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.24 GiB is "
    "free. Including non-PyTorch memory, this process has 77.80 GiB in use. Of the allocated memory 74 GiB is "
    "allocated by PyTorch, and 2.11 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
NCCL_SAYS = "NCCL error: unhandled cuda error\nncclUnhandledCudaError: Cuda failure 2 'out of memory'"


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (torch.OutOfMemoryError(PYTORCH_SAYS), "2.11 GiB is reserved"),
        (dist.DistBackendError(NCCL_SAYS), "Cuda failure 2"),
    ],
    ids=["PyTorch", "NCCL"],
)
def test_it_is_told_with_where_and_what_to_do(error, number):
    with pytest.raises(PassingError) as told, naming_a_full_gpu(lambda: "step 12 of stage 64k", "take less"):
        raise error
    said = str(told.value)
    assert said.startswith("step 12 of stage 64k: ") and number in said and said.endswith("; take less")
    assert "expandable_segments" not in said and "\n" not in said


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), dist.DistBackendError("NCCL error: connection closed")], ids=str
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error), match=str(error)), naming_a_full_gpu(lambda: "here", "take less"):
        raise error

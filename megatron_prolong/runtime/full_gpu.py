"""A GPU whose memory is full ends the process with one message that says where, not with the allocator's trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_prolong.errors import PassingError


@contextmanager
def naming_a_full_gpu(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn what PyTorch raises for want of GPU memory into a UserError.

    Args:
        where: called when it happens, e.g. "step 12 of stage 64k".
        remedy: what needs less memory.

    Raises:
        PassingError: a tensor, or a buffer of NCCL's, found no room. It may find some after another start, which
            begins with none reserved.
    """
    try:
        yield
    except (torch.OutOfMemoryError, dist.DistError) as error:
        said = next((line for line in str(error).splitlines() if "out of memory" in line), None)
        if said is None:
            raise
        said = said.partition(" If reserved but")[0]  # advice follows that is taken already
        raise PassingError(f"{where()}: the GPU's memory is full ({said}); {remedy}") from error

"""The same numbers bit for bit, whenever the same step is made again.

A kernel whose blocks add into one place in the order they finish rounds differently each time. PyTorch has others
in their place, and refuses the operations that have none (torch.use_deterministic_algorithms). cuBLAS also needs
CUBLAS_WORKSPACE_CONFIG, which must stand before its first product (gpu_environment.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, PyTorch uses only kernels that always add in the same order.

    Megatron (mcore/config.py), our choice of attention (mcore/transformer_engine.py) and PyTorch's
    FlashAttention-2 and 3 go by PyTorch's switch.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

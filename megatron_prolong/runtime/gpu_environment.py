"""Environment variables that CUDA, PyTorch's allocator, NCCL and Transformer Engine read as they start.

The values are those of Megatron-Bridge's recipes (recipes/utils/environment_utils.py) and performance guide.
TORCH_NCCL_AVOID_RECORD_STREAMS is not among them: PyTorch does so by default since 2.8.
"""

from __future__ import annotations

import os

GPU_ENVIRONMENT = {
    # Micro-batches differ in length: with segments of fixed size, memory would fragment.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # One queue: kernels start in the order of their launch, communication before the product that hides it.
    # Blackwell does not need this; it does no harm there.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Norm kernels wait for every multiprocessor they ask for; this many stay free for communication.
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "16",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "16",
    # Communication is what other ranks wait for: it goes first.
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    # Reductions in the switch would take memory for every group of ranks; gathers and scatters do without.
    "NCCL_NVLS_ENABLE": "0",
    # What `deterministic: true` needs before cuBLAS's first product; 32 MiB, as PyTorch takes on Hopper without it.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Compile in the process itself: workers of a pool would die from the signal that asks for a save.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def set_gpu_environment() -> None:
    """Set what the user has not; before torch is imported.

    Torch's compiler reads this as it is imported, its allocator at the first call of CUDA, which Transformer Engine
    makes as it is imported itself where the flash-attn package is installed.
    """
    for name, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

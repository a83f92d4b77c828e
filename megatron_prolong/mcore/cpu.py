"""The compatibility layer: what lets Megatron-Core, written for CUDA, run on a machine without it.

`cuda_on_cpu()` is entered once, by `mcore.groups.megatron`, and only when CUDA is absent. Inside it, every call
Megatron makes for a CUDA device is answered with the CPU; nothing else changes. The table of replacements
below is the whole of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import utils as megatron_utils
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

from megatron_prolong.runtime.replace import replaced

CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Answers device="cuda" with the CPU in every torch call.

    Megatron writes the literal device="cuda" when it makes small tensors (token counts in
    pipeline_parallel/schedules.py, norms in optimizer/clip_grads.py, scales in optimizer/optimizer.py).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and any(_is_cuda(argument) for argument in args[1:]):
            args = tuple(CPU if _is_cuda(argument) else argument for argument in args)
        # Tensor.cuda(): optimizer and schedule code moves counters to "the" device.
        if func is torch.Tensor.cuda:
            return args[0]
        # Tensor.type(): the optimizers compare it with 'torch.cuda.FloatTensor' and its bf16 sister.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Run Megatron-Core on CPU inside this context.

    Raises:
        AssertionError: CUDA is there; the layer must never hide a real GPU.
    """
    assert not torch.cuda.is_available(), "the CPU compatibility layer must not be entered where CUDA is"
    replacements: list[tuple[Any, str, Any]] = [
        # `device=torch.cuda.current_device()` is how Megatron places parameters and buffers.
        (torch.cuda, "current_device", lambda: CPU),
        # parallel_state and the communication of pipeline stages wait for the GPU; a CPU has no queue.
        (torch.cuda, "synchronize", lambda *_: None),
        # Since 0.18 gradients wait for what CUDA graphs have added; there are none.
        (torch.cuda, "current_stream", lambda *_: None),
        # Tensor-parallel initialisation and recompute keep a second random stream "on the GPU":
        # on CPU both streams are torch's one generator, saved and restored the same way.
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        (torch.cuda, "manual_seed", torch.default_generator.manual_seed),
        (megatron_random, "_get_cuda_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
        # Where Transformer Engine or Apex is installed anyway, their kernels need CUDA.
        (clip_grads, "l2_norm_impl", megatron_utils.local_multi_tensor_l2_norm),
        (clip_grads, "multi_tensor_scale_impl", megatron_utils.local_multi_tensor_scale),
        (clip_grads, "multi_tensor_applier", megatron_utils.local_multi_tensor_applier),
        (megatron_optimizer, "multi_tensor_scale_impl", megatron_utils.local_multi_tensor_scale),
        (megatron_optimizer, "multi_tensor_applier", megatron_utils.local_multi_tensor_applier),
    ]
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):  # since 0.17, of newer Transformer Engines
        replacements.append((clip_grads, "multi_tensor_scale_tensor_impl", None))
    with replaced(replacements), _CudaMeansCpu():
        yield


def without_cuda_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Inside, torch is called as it is: for code that names no CUDA device, where microseconds per call add up."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()

"""FlashAttention-3 behind PyTorch's flash attention: on Hopper 1.8 times as fast as what PyTorch brings.

PyTorch has FlashAttention-2 built in, and calls FlashAttention-3's kernels through the same operators once it is
told to (torch/nn/attention/_fa3.py), for us and for scaled_dot_product_attention. The speed is that of arXiv
2407.08608, figures 5 and 6. Not FlashAttention-4: PyTorch 2.13 expects two results of a function that now has five.
"""

from __future__ import annotations

from importlib.util import find_spec

from megatron_prolong.errors import UserError

INSTALL = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"


def is_flash_attention_3_installed() -> bool:
    """Whether the module that PyTorch would call is there. Nothing of it is imported."""
    return find_spec("flash_attn_interface") is not None


def use_flash_attention_3() -> None:
    """Have PyTorch attend with FlashAttention-3 in this process, on a Hopper GPU where it is installed.

    Raises:
        UserError: it is installed but does not run: built for another PyTorch, or without its backward, or PyTorch
            is an early 2.11 whose own part was unfinished.
    """
    import torch

    if not is_flash_attention_3_installed() or torch.cuda.get_device_capability()[0] != 9:
        return
    try:
        from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

        if current_flash_attention_impl() == "FA3":  # a second run in this process
            return
        activate_flash_attention_impl("FA3")
        _attend()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"flash-attn-3 is installed, but PyTorch {torch.__version__} cannot use it: {said}; uninstall it, or "
            f"install the one for this PyTorch and CUDA: {INSTALL}"
        ) from error


def _attend() -> None:
    """A document of one token, forward and backward: what does not fit fails here and not in the first step."""
    import torch

    token = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    documents = (*[torch.tensor([0, 1], dtype=torch.int32, device="cuda")] * 2, 1, 1, 0.0, True)
    qkv = (token, token, token)
    out, lse, *states, _ = torch.ops.aten._flash_attention_forward(*qkv, *documents, False, scale=1.0)
    torch.ops.aten._flash_attention_backward(token, *qkv, out, lse, *documents, *states, scale=1.0)

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
        UserError: it is installed but cannot be loaded, or was built without its backward.
    """
    import torch
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    if not is_flash_attention_3_installed() or torch.cuda.get_device_capability()[0] != 9:
        return
    if current_flash_attention_impl() == "FA3":  # a second run in this process
        return
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"flash-attn-3 is installed, but PyTorch {torch.__version__} cannot use it: {said}; install the one "
            f"for this PyTorch and CUDA ({INSTALL}), or uninstall it"
        ) from error

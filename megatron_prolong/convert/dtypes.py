"""Names of the three weight dtypes."""

from __future__ import annotations

import torch

from megatron_prolong.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name; None stays None. Raises UserError for other names."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise UserError(f"dtype {name!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the module, as in config.json: "bfloat16"."""
    return str(dtype).removeprefix("torch.")

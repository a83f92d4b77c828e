"""In the place of FlashAttention-3's package under `run.py --compute --flash3`: its operators, computed on the CPU.

The signatures are those of hopper/flash_api_stable.cpp, and what it refuses is refused; PyTorch's own code
(torch/nn/attention/_fa3.py) calls them.
"""

from __future__ import annotations

from typing import Any

import kernels
import torch
from torch import Tensor

_PACKED = "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
_USED = "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
_MASK = "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    f"Tensor(out!)? out=None, {_PACKED}Tensor? cu_seqlens_k_new=None, {_USED}Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    f"float? softmax_scale=None, {_MASK}int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    f"Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, {_PACKED}{_USED}float? softmax_scale=None, {_MASK}"
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Packed queries and keys, or one document alone; of the other arguments those that our calls set."""
    given = _named("fwd", (q, k, v, *arguments))
    _check(given)
    out, lse_NT, *_ = kernels.flash_attention_forward(
        q, k, v, *_documents(given), scale=given["softmax_scale"]
    )
    host = kernels.host(lse_NT)
    host.masked_fill_(host == torch.inf, -torch.inf)  # queries without keys
    empty = q.new_empty(0)
    return out, lse_NT, empty, empty


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Into `dq`, `dk` and `dv`."""
    given = _named("bwd", (dout, q, k, v, *arguments))
    _check(given)
    out, lse = given["out"], given["softmax_lse"]
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    gradients = kernels.flash_attention_backward(
        dout, q, k, v, out, lse, *_documents(given)[:4], 0.0, given["is_causal"], lse, lse,
        scale=given["softmax_scale"],
    )  # fmt: skip
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        given[name].copy_(gradient)
    return (q.new_empty(0),) * 5


def _named(operator: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Argument name → value; what was left out has its default."""
    schema = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
    left_out = [argument.default_value for argument in schema[len(arguments) :]]
    return dict(zip((argument.name for argument in schema), (*arguments, *left_out), strict=True))


def _check(given: dict[str, Any]) -> None:
    """What the kernels refuse."""
    for lengths in (given["cu_seqlens_q"], given["cu_seqlens_k"]):
        assert (lengths is None) == (given["q"].dim() == 4)
        assert lengths is None or (
            lengths.dtype == torch.int32 and lengths.is_contiguous() and lengths.is_cuda
        )
    half = [
        given[name]
        for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
        if given.get(name) is not None
    ]
    assert {x.dtype for x in half} in ({torch.bfloat16}, {torch.float16}), "half precision only"
    assert all(x.stride(-1) == 1 and x.is_cuda for x in half)
    num_heads, head_dim = given["q"].shape[-2:]
    assert head_dim % 8 == 0 and head_dim <= 256 and num_heads % given["k"].shape[-2] == 0


def _documents(given: dict[str, Any]) -> tuple[Any, ...]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return (*(given[name] for name in names), 0.0, given["is_causal"], False)


LIBRARY = torch.library.Library("flash_attn_3", "DEF")
LIBRARY.define(FORWARD)
LIBRARY.define(BACKWARD)
LIBRARY.impl("fwd", forward, "CUDA")
LIBRARY.impl("bwd", backward, "CUDA")

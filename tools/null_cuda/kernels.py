"""PyTorch's CUDA operators, computed by its CPU operators, for a runtime whose device memory is host memory.

Imported at the start of every Python process under `run.py --compute`. Each operator that has a CUDA kernel gets
one that sees the same memory as CPU tensors, calls the CPU kernel and hands out CUDA tensors. What reserves memory
or makes views stays PyTorch's own. Flash attention, which CPUs have in another form, is written out below.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# Memory, not arithmetic: PyTorch's own serve a null CUDA as they serve a GPU.
_MEMORY = {"empty", "empty_strided", "resize_", "set_", "is_set_to", "record_stream", "_efficientzerotensor"}


def host(tensor: Tensor) -> Tensor:
    """The same memory as a CPU tensor of the same shape and strides."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = _host_storage(storage.data_ptr(), storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


@lru_cache(maxsize=4096)
def _host_storage(address: int, size: int) -> torch.UntypedStorage:
    memory = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def device(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor in the memory of the current GPU."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    host(copy).copy_(tensor)
    return copy


def on_host(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA kernel of `operator` that its CPU kernel computes."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given: dict[int, tuple[Tensor, Tensor]] = {}  # CPU tensors that were CUDA tensors, by id

        def to_host(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                alias = host(value)
                given[id(alias)] = alias, value
                return alias
            if isinstance(value, torch.Generator) and value.device.type == "cuda":
                return _host_generator(value)
            if isinstance(value, torch.device) and value.type == "cuda":
                return torch.device("cpu")
            return value

        def to_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in given:
                return device(value)
            alias, original = given[id(value)]
            if alias.shape != original.shape:  # an output that was empty
                original.resize_(alias.shape)
                host(original).copy_(alias)
            return original

        if operator in _RANDOM and kwargs.get("generator") is None:
            kwargs["generator"] = torch.cuda.default_generators[torch.cuda.current_device()]
        return tree_map(to_device, operator(*tree_map(to_host, args), **tree_map(to_host, kwargs)))

    return kernel


def _host_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator that the state of a CUDA generator seeds; that state moves on."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator().manual_seed((generator.initial_seed() * 1_000_003 + offset) % 2**63)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    **_: Any,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward` for packed documents [T, N, D], one after another, with their scores; or for
    one alone [1, T, N, D]."""
    if cum_seq_q is None or cum_seq_k is None:
        cum_q, cum_k = (device(torch.tensor([0, x.shape[1]], dtype=torch.int32)) for x in (query, key))
        q, k, v = (x.squeeze(0) for x in (query, key, value))
        out, lse_NT, *rest = flash_attention_forward(
            q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        return out.unsqueeze(0), lse_NT.unsqueeze(0), *rest
    assert max_q == cum_seq_q.diff().max() and max_k == cum_seq_k.diff().max(), "wrong longest document"
    q, k, v = (host(x) for x in (query, key, value))
    out, lse_NT = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
    for rows_q, rows_k in _documents(cum_seq_q, cum_seq_k):
        scores = _scores(q[rows_q], k[rows_k], scale, is_causal)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse.unsqueeze(-1)).exp()
        values = _per_query_head(v[rows_k], q.shape[1])
        out[rows_q] = torch.einsum("nts,snd->tnd", probabilities, values).to(q.dtype)
        lse_NT[:, rows_q] = lse
    state = torch.zeros(2, dtype=torch.uint64)
    return tuple(device(x) for x in (out, lse_NT, state, torch.empty(0), torch.empty(0)))


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    **_: Any,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward` for packed documents, from the log-sum-exp [N, T] it is given."""
    dout, q, k, v, out, lse_NT = (host(x) for x in (grad_out, query, key, value, out, logsumexp))
    heads = q.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows_q, rows_k in _documents(cum_seq_q, cum_seq_k):
        scores = _scores(q[rows_q], k[rows_k], scale, is_causal)
        probabilities = (scores - lse_NT[:, rows_q].unsqueeze(-1)).exp()
        do, o = dout[rows_q].float(), out[rows_q].float()
        dvalues = torch.einsum("nts,tnd->snd", probabilities, do)
        dprobabilities = torch.einsum("tnd,snd->nts", do, _per_query_head(v[rows_k], heads))
        delta_NT1 = (do * o).sum(-1).T.unsqueeze(-1)
        dscores = probabilities * (dprobabilities - delta_NT1) * scale
        dq[rows_q] = torch.einsum("nts,snd->tnd", dscores, _per_query_head(k[rows_k], heads)).to(q.dtype)
        dkeys = torch.einsum("nts,tnd->snd", dscores, q[rows_q].float())
        dk[rows_k], dv[rows_k] = (
            x.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for x in (dkeys, dvalues)
        )
    return tuple(device(x) for x in (dq, dk, dv))


def cudnn_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """`aten::_scaled_dot_product_cudnn_attention` for inference, [B, N, T, D]."""
    q, k, v = (host(x) for x in (query, key, value))
    bias = None if attn_bias is None else host(attn_bias)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, bias, dropout_p, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    none = device(torch.empty(0))
    return device(out), none, none, none, q.shape[2], k.shape[2], none, none, none


def addmm_in_fp32(
    self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, out: Tensor, **_: Any
) -> Tensor:
    """`aten::addmm.dtype_out`: products of half precision, added up in fp32."""
    torch.addmm(host(self), host(mat1).float(), host(mat2).float(), out=host(out))
    return out


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """`aten::_fused_rms_norm`: the normed input, and the reciprocal of each root mean square in fp32."""
    x, w = host(input), None if weight is None else host(weight)
    axes = tuple(range(-len(normalized_shape), 0))
    wide = x.float()
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (wide.square().mean(axes, keepdim=True) + epsilon).rsqrt()
    normed = wide * rstd if w is None else wide * rstd * w.float()
    return device(normed.to(x.dtype)), device(rstd)


def rms_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """`aten::_fused_rms_norm_backward`."""
    dout, x, r = host(grad_out).float(), host(input).float(), host(rstd)
    axes = tuple(range(-len(normalized_shape), 0))
    dnormed = dout if weight is None else dout * host(weight).float()
    normed = x * r
    dx = r * (dnormed - normed * (dnormed * normed).mean(axes, keepdim=True))
    if weight is None or not output_mask[1]:
        return device(dx.to(input.dtype)), None
    dweight = (dout * normed).flatten(0, -len(normalized_shape) - 1).sum(0)
    return device(dx.to(input.dtype)), device(dweight.to(weight.dtype))


def _documents(cum_seq_q: Tensor, cum_seq_k: Tensor) -> list[tuple[slice, slice]]:
    starts = zip(host(cum_seq_q).tolist(), host(cum_seq_k).tolist(), strict=True)
    return [
        (slice(q, next_q), slice(k, next_k)) for (q, k), (next_q, next_k) in pairwise(starts) if next_q > q
    ]


def _per_query_head(keys_SGD: Tensor, num_heads: int) -> Tensor:
    return keys_SGD.float().repeat_interleave(num_heads // keys_SGD.shape[1], dim=1)


def _scores(q_TND: Tensor, k_SGD: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Scaled scores [N, T, S] in fp32; a causal mask is aligned at the end, as Flash Attention's is since 2.1."""
    scores = torch.einsum("tnd,snd->nts", q_TND.float(), _per_query_head(k_SGD, q_TND.shape[1])) * scale
    if is_causal:
        num_queries, num_keys = scores.shape[1:]
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + num_keys - num_queries)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _returns_view(schema: Any) -> bool:
    return any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)


_RANDOM: set[Any] = set()
_OWN: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_backward": flash_attention_backward,
    "_fused_rms_norm": rms_norm,
    "_fused_rms_norm_backward": rms_norm_backward,
    "addmm.dtype_out": addmm_in_fp32,
    "_scaled_dot_product_cudnn_attention": cudnn_attention,
    "_fused_sdp_choice": lambda *args, **kwargs: 0,  # scaled_dot_product_attention in plain operations
}


def install() -> torch.library.Library:
    """Register the kernels; they stay for as long as what is returned."""
    library = torch.library.Library("aten", "IMPL")
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    for qualified in {*registered, "aten::copy_"}:
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or packet in _MEMORY:
            continue
        if "flash_attention" in packet and find_spec("flash_attn_interface") is not None:
            continue  # PyTorch puts FlashAttention-3 there; 2.11 refuses to do so over another kernel from Python
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if _returns_view(operator._schema):
            continue
        if any(argument.name == "generator" for argument in operator._schema.arguments):
            _RANDOM.add(operator)
        library.impl(name, _OWN.get(name) or on_host(operator), "CUDA")
    return library


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that PyTorch's kernels are replaced
    LIBRARY = install()

"""The dull twins: what the clever attention code must equal, written as plainly as PyTorch allows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_prolong.model.context_plan import ContextPlan


def document_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """Each document by itself through PyTorch's unfused causal attention; zeros behind the last document."""
    group_size = q_TND.shape[1] // k_TGD.shape[1]
    outs = []
    for start, stop in pairwise(cu_seqlens):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (q_TND, k_TGD, v_TGD))
        k, v = (x.repeat_interleave(group_size, dim=0) for x in (k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        outs.append(out.transpose(0, 1))
    outs.append(torch.zeros_like(q_TND[cu_seqlens[-1] :]))
    return torch.cat(outs)


def gather(plan: ContextPlan, slices: Sequence[Tensor]) -> Tensor:
    """The tensor over the packed sequence from all ranks' slices: the inverse of `take`."""
    whole = slices[0].new_empty((plan.num_tokens, *slices[0].shape[1:]))
    for rank, part in enumerate(slices):
        rows = plan.take(torch.arange(plan.num_tokens), rank, -1)
        whole[rows[rows >= 0]] = part[rows >= 0]
    return whole


def random_qkv(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leaf tensors q, k, v and a gradient for the output."""
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    q, k, v, dout = (torch.randn(num_tokens, n, head_dim, generator=generator).to(dtype) for n in heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

"""Output layer and cross entropy in one, over chunks of tokens: no more than one chunk of logits exists.

At 512K tokens and 128,256 words the fp32 logits alone are 262 GB; here they are `chunk_tokens` rows, and what
stays for the backward is one number per token. The backward computes each chunk's logits again (a third more
work in this one layer) instead of keeping a gradient made in the forward, as Liger's fused loss does: that
needs the factor of each token's loss beforehand, and with pipeline stages, gradient accumulation and a token
count summed over all ranks it is not yet known.

Tensor parallel: each rank holds a run of the vocabulary's rows, and two small all-reduces over all tokens at
once (not per chunk) make the losses. Context parallel and sequence parallel are the caller's: see
`chunked_cross_entropy` for what the gradients mean.

Axes: T tokens, H hidden size, V this rank's vocabulary rows, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default


def chunked_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    vocab_start: int,
    real_vocab_size: int,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Loss of each token, fp32 [T]; 0 where the label is -100.

    Args:
        hidden_TH: input of the output layer, the same tokens on every rank of `group`.
        weight_VH: this rank's rows of the output layer, in hidden's dtype.
        labels_T: int64 next tokens (indices of the whole vocabulary), or -100 for no loss.
        vocab_start: index of the first of this rank's rows. Rows from `real_vocab_size` on are padding: they
            take no part in the softmax and get gradient 0.
        chunk_tokens: rows of logits that exist at a time, per rank.
        group: tensor-parallel group; None for one rank.

    The gradient of hidden_TH is this rank's *part*: the sum over `group` is the gradient. (Megatron's
    `copy_to_tensor_model_parallel_region` or `gather_from_sequence_parallel_region` before this sums it.) The
    weight's gradient is complete for this rank's rows and is summed over chunks in fp32. Logits are products
    in hidden's dtype, then fp32, as in Megatron and transformers.
    """
    assert chunk_tokens > 0 and hidden_TH.dtype == weight_VH.dtype
    num_real_rows = min(max(real_vocab_size - vocab_start, 0), len(weight_VH))
    return _ChunkedCrossEntropy.apply(
        hidden_TH, weight_VH, labels_T, vocab_start, num_real_rows, chunk_tokens, group
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        vocab_start: int,
        num_real_rows: int,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        real_weight_VH = weight_VH[:num_real_rows]
        rows_T, is_mine_T = _local_rows(labels_T, vocab_start, num_real_rows)
        lse_T = labels_T.new_full(labels_T.shape, -torch.inf, dtype=torch.float32)
        target_T = torch.zeros_like(lse_T)
        for chunk in _chunks(len(hidden_TH) if num_real_rows else 0, chunk_tokens):
            logits_CV = (hidden_TH[chunk] @ real_weight_VH.T).float()
            target_T[chunk] = logits_CV.gather(-1, rows_T[chunk, None]).squeeze(-1) * is_mine_T[chunk]
            lse_T[chunk] = _logsumexp_(logits_CV)
            del logits_CV  # before the next chunk's are made
        lse_T, target_T = _combine(lse_T, target_T, group)
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T, lse_T)
        ctx.arguments = vocab_start, num_real_rows, chunk_tokens
        return (lse_T - target_T).masked_fill(labels_T == IGNORED_LABEL, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T, lse_T = ctx.saved_tensors
        vocab_start, num_real_rows, chunk_tokens = ctx.arguments
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        real_weight_VH = weight_VH[:num_real_rows]
        rows_T, is_mine_T = _local_rows(labels_T, vocab_start, num_real_rows)
        dlosses_T = dlosses_T.float().masked_fill(labels_T == IGNORED_LABEL, 0.0)
        dhidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        for chunk in _chunks(len(hidden_TH) if num_real_rows else 0, chunk_tokens):
            dlogits_CV = (hidden_TH[chunk] @ real_weight_VH.T).float()
            dlogits_CV.sub_(lse_T[chunk, None]).exp_().mul_(dlosses_T[chunk, None])
            at_target_C1 = (dlosses_T[chunk] * is_mine_T[chunk]).unsqueeze(-1)
            dlogits_CV.scatter_add_(-1, rows_T[chunk, None], -at_target_C1)
            dlogits_CV = dlogits_CV.to(hidden_TH.dtype)
            if dhidden_TH is not None:
                dhidden_TH[chunk] = dlogits_CV @ real_weight_VH
            if dweight_VH is not None:
                _add_product(dweight_VH[:num_real_rows], dlogits_CV.T, hidden_TH[chunk])
            del dlogits_CV
        dweight_VH = None if dweight_VH is None else dweight_VH.to(weight_VH.dtype)
        return dhidden_TH, dweight_VH, None, None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens))


def _logsumexp_(logits_CV: Tensor) -> Tensor:
    """Log-sum-exp of each row, in place: torch.logsumexp would make a second chunk of exponentials."""
    max_C1 = logits_CV.amax(dim=-1, keepdim=True)
    return logits_CV.sub_(max_C1).exp_().sum(dim=-1).log_().add_(max_C1.squeeze(-1))


def _local_rows(labels_T: Tensor, vocab_start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """This rank's weight row of each label (any valid row where it has none), and whether it has one."""
    rows_T = labels_T - vocab_start
    is_mine_T = (rows_T >= 0) & (rows_T < num_rows)
    return rows_T.masked_fill(~is_mine_T, 0), is_mine_T


def _combine(lse_T: Tensor, target_T: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the whole vocabulary and the target's logit, from each rank's part."""
    if group is None or dist.get_world_size(group) == 1:
        return lse_T, target_T
    max_T = lse_T.clone()  # finite after the reduction: some rank has real rows
    dist.all_reduce(max_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack((torch.exp(lse_T - max_T), target_T))
    dist.all_reduce(sums_2T, group=group)
    return max_T + torch.log(sums_2T[0]), sums_2T[1]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left @ right, without a temporary where the dtypes allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)

"""Output layer and cross entropy in one, over chunks of tokens: no more than one chunk of logits exists.

At 512K tokens and 128,256 words the fp32 logits alone are 262 GB; here they are `chunk_tokens` rows. A training
step needs the sum of the losses, whose gradient is known up to one factor as soon as a chunk's logits are there: it
is made in the forward, in place of the logits, and only scaled in the backward (as in Liger's fused loss, Hsu et
al. 2024). In between stay the gradient of the hidden states, as large as they are, and the weight's, in fp32.

Tensor parallel: each rank holds a run of the vocabulary's rows, and two small all-reduces per chunk complete its
softmax. Context and sequence parallel are the caller's: see `cross_entropy_sum` for what the gradients mean.

Axes: T tokens, H hidden size, V this rank's vocabulary rows, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NO_LABEL = -100  # torch.nn.functional.cross_entropy's default


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of the output layer.

    Attributes:
        start: index of the first of this rank's rows in the whole vocabulary.
        real_size: size of the whole vocabulary. Rows from there on are padding: they take no part in the softmax
            and get gradient 0.
        group: tensor-parallel ranks; None for one rank.
    """

    start: int
    real_size: int
    group: dist.ProcessGroup | None = None


def token_losses(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, shard: VocabularyShard, chunk_tokens: int
) -> Tensor:
    """Loss of each token, fp32 [T], without gradient; 0 where the label is -100. See `cross_entropy_sum`."""
    losses_T = torch.zeros(len(hidden_TH), device=hidden_TH.device)
    with torch.no_grad():
        for chunk in _chunks(len(hidden_TH), chunk_tokens):
            losses_T[chunk] = _part(hidden_TH[chunk], weight_VH, labels_T[chunk], shard).losses_C
    return losses_T


def cross_entropy_sum(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, shard: VocabularyShard, chunk_tokens: int
) -> Tensor:
    """Sum of the losses of all tokens with a label, a fp32 scalar the same on every rank; backward works once.

    Args:
        hidden_TH: input of the output layer, the same tokens on every rank of the group.
        weight_VH: this rank's rows of the output layer, in hidden's dtype.
        labels_T: int64 next tokens (indices of the whole vocabulary), or -100 for no loss.
        chunk_tokens: rows of logits that exist at a time, per rank.

    The gradient of hidden_TH is this rank's *part*: the sum over the group is the gradient. (Megatron's
    `copy_to_tensor_model_parallel_region` or `gather_from_sequence_parallel_region` before this sums it.) The
    weight's gradient is complete for this rank's rows and is summed over chunks in fp32. Logits are products
    in hidden's dtype, then fp32, as in Megatron and transformers.
    """
    assert chunk_tokens > 0 and hidden_TH.dtype == weight_VH.dtype
    return _CrossEntropySum.apply(hidden_TH, weight_VH, labels_T, shard, chunk_tokens)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        losses_T = torch.zeros(len(hidden_TH), device=hidden_TH.device)
        for chunk in _chunks(len(hidden_TH), chunk_tokens):
            part = _part(hidden_TH[chunk], weight_VH, labels_T[chunk], shard)
            losses_T[chunk] = part.losses_C
            dlogits_CV = part.gradient_().to(hidden_TH.dtype)
            num_rows = dlogits_CV.shape[1]
            if dhidden_TH is not None:
                dhidden_TH[chunk] = dlogits_CV @ weight_VH[:num_rows]
            if dweight_VH is not None:
                _add_product(dweight_VH[:num_rows], dlogits_CV.T, hidden_TH[chunk])
            del part, dlogits_CV  # before the next chunk's logits are made
        ctx.save_for_backward(dhidden_TH)
        ctx.dweight_VH = dweight_VH  # no activation: nothing that saves or offloads those should meet it
        ctx.weight_dtype = weight_VH.dtype
        return losses_T.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden_TH,), dweight_VH = ctx.saved_tensors, ctx.dweight_VH
        del ctx.dweight_VH  # both are scaled in place: they serve once
        dhidden_TH = None if dhidden_TH is None else dhidden_TH.mul_(dtotal)
        dweight_VH = None if dweight_VH is None else dweight_VH.mul_(dtotal).to(ctx.weight_dtype)
        return dhidden_TH, dweight_VH, None, None, None


@dataclass
class _Part:
    """Losses of one chunk, and what their gradient is made of.

    Attributes:
        exponentials_CV: of this rank's real logits, each less its token's highest.
        factor_C: what makes them probabilities; 0 where there is no label.
        rows_C: this rank's row of the label, any row where not `is_mine_C`.
    """

    losses_C: Tensor
    exponentials_CV: Tensor
    factor_C: Tensor
    rows_C: Tensor
    is_mine_C: Tensor

    def gradient_(self) -> Tensor:
        """d(sum of losses)/d(logits) [C, V], in place of the exponentials."""
        dlogits_CV = self.exponentials_CV.mul_(self.factor_C.unsqueeze(-1))
        if dlogits_CV.shape[1]:
            dlogits_CV.scatter_add_(-1, self.rows_C.unsqueeze(-1), -self.is_mine_C.float().unsqueeze(-1))
        return dlogits_CV


def _part(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, shard: VocabularyShard) -> _Part:
    num_rows = min(max(shard.real_size - shard.start, 0), len(weight_VH))
    rows_C, is_mine_C = _local_rows(labels_C, shard.start, num_rows)
    logits_CV = (hidden_CH @ weight_VH[:num_rows].T).float()
    if num_rows:
        target_C = logits_CV.gather(-1, rows_C.unsqueeze(-1)).squeeze(-1) * is_mine_C
        highest_C = logits_CV.amax(dim=-1)
    else:  # a rank of padding has no part in the sums, but in the reductions
        target_C = torch.zeros(len(labels_C), device=labels_C.device)
        highest_C = torch.full_like(target_C, -torch.inf)
    exponentials_CV = logits_CV.sub_(highest_C.unsqueeze(-1)).exp_()
    lse_C = highest_C + exponentials_CV.sum(dim=-1).log_()
    lse_C, target_C = _combine(lse_C, target_C, shard.group)
    ignored_C = labels_C == NO_LABEL
    losses_C = (lse_C - target_C).masked_fill_(ignored_C, 0.0)
    factor_C = (highest_C - lse_C).exp_().masked_fill_(ignored_C, 0.0)
    return _Part(losses_C, exponentials_CV, factor_C, rows_C, is_mine_C)


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    return (slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens))


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

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
    """Loss of each token, fp32 [T], without gradient; 0 where the label is negative. See `cross_entropy_sum`."""
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
        labels_T: int64 next tokens (indices of the whole vocabulary); negative for no loss.
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
        dhidden_TH = torch.zeros_like(hidden_TH)
        dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        losses_T = torch.zeros(len(hidden_TH), device=hidden_TH.device)
        for chunk in _chunks(len(hidden_TH), chunk_tokens):
            part = _part(hidden_TH[chunk], weight_VH, labels_T[chunk], shard)
            losses_T[chunk] = part.losses_C
            dlogits_CV = part.gradient_()
            num_rows = dlogits_CV.shape[1]
            dhidden_TH[chunk] = dlogits_CV @ weight_VH[:num_rows]
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
        return dhidden_TH.mul_(dtotal), dweight_VH.mul_(dtotal).to(ctx.weight_dtype), None, None, None


@dataclass
class _Part:
    """Losses of one chunk, and what their gradient is made of.

    Attributes:
        softmax: of this rank's real logits.
        lse_C: log-sum-exp over the whole vocabulary.
        has_label_C: where a loss is taken.
        rows_C: this rank's row of the label, any row where not `is_mine_C`.
    """

    losses_C: Tensor
    softmax: _Softmax | _FusedSoftmax
    lse_C: Tensor
    has_label_C: Tensor
    rows_C: Tensor
    is_mine_C: Tensor

    def gradient_(self) -> Tensor:
        """d(sum of losses)/d(logits) [C, V] in the logits' dtype; works once."""
        return self.softmax.gradient_(self.lse_C, self.has_label_C, self.rows_C, self.is_mine_C)


def _part(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, shard: VocabularyShard) -> _Part:
    num_rows = min(max(shard.real_size - shard.start, 0), len(weight_VH))
    rows_C, is_mine_C = _local_rows(labels_C, shard.start, num_rows)
    logits_CV = hidden_CH @ weight_VH[:num_rows].T
    if num_rows:
        target_C = logits_CV.gather(-1, rows_C.unsqueeze(-1)).squeeze(-1).float() * is_mine_C
    else:  # a rank of padding has no part in the sums, but in the reductions
        target_C = torch.zeros(len(labels_C), device=labels_C.device)
    softmax = _FusedSoftmax(logits_CV) if logits_CV.is_cuda and num_rows else _Softmax(logits_CV)
    lse_C, target_C = _combine(softmax.lse_C, target_C, shard.group)
    has_label_C = labels_C >= 0
    losses_C = (lse_C - target_C).masked_fill_(~has_label_C, 0.0)
    return _Part(losses_C, softmax, lse_C, has_label_C, rows_C, is_mine_C)


class _Softmax:
    """Softmax of a chunk's logits [C, V]: their log-sum-exp, then their gradient.

    Attributes:
        lse_C: over these V words; -inf if there is none.
    """

    def __init__(self, logits_CV: Tensor) -> None:
        self._dtype = logits_CV.dtype
        logits_CV = logits_CV.float()
        if logits_CV.shape[1]:
            self._highest_C = logits_CV.amax(dim=-1)
        else:
            self._highest_C = logits_CV.new_full((len(logits_CV),), -torch.inf)
        self._exponentials_CV = logits_CV.sub_(self._highest_C.unsqueeze(-1)).exp_()
        self.lse_C = self._highest_C + self._exponentials_CV.sum(dim=-1).log_()

    def gradient_(self, lse_C: Tensor, has_label_C: Tensor, rows_C: Tensor, is_mine_C: Tensor) -> Tensor:
        """See `_Part`; in place of the exponentials."""
        factor_C = (self._highest_C - lse_C).exp_().masked_fill_(~has_label_C, 0.0)
        dlogits_CV = self._exponentials_CV.mul_(factor_C.unsqueeze(-1))
        if dlogits_CV.shape[1]:
            dlogits_CV.scatter_add_(-1, rows_C.unsqueeze(-1), -is_mine_C.float().unsqueeze(-1))
        return dlogits_CV.to(self._dtype)


class _FusedSoftmax:
    """The same on a GPU in two compiled kernels, with nothing of size C·V beside the logits.

    Each of the operations of `_Softmax` reads and writes all logits: 44 bytes for each of them, against some 8.
    """

    def __init__(self, logits_CV: Tensor) -> None:
        torch._dynamo.maybe_mark_dynamic(logits_CV, 0)  # the last chunk is shorter: no second kernel for it
        self._logits_CV = logits_CV
        self.lse_C: Tensor = _compiled(_log_sum_exp)(logits_CV)

    def gradient_(self, lse_C: Tensor, has_label_C: Tensor, rows_C: Tensor, is_mine_C: Tensor) -> Tensor:
        """See `_Part`; in place of the logits."""
        word_C = torch.where(is_mine_C, rows_C, -1)
        return _compiled(_to_gradient_)(self._logits_CV, lse_C, has_label_C, word_C)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _log_sum_exp(logits_CV: Tensor) -> Tensor:
    return logits_CV.float().logsumexp(dim=-1)


def _to_gradient_(logits_CV: Tensor, lse_C: Tensor, has_label_C: Tensor, word_C: Tensor) -> Tensor:
    probabilities_CV = (logits_CV.float() - lse_C.unsqueeze(-1)).exp() * has_label_C.unsqueeze(-1)
    words_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    return logits_CV.copy_(probabilities_CV - (words_V == word_C.unsqueeze(-1)).float())


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
    """total (fp32) += left @ right; without a temporary, and unrounded, except in half precision on a CPU."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)

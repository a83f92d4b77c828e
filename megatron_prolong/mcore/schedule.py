"""Forward and backward of one global batch through Megatron's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.mcore.micro_batch import MicroBatch


def forward_backward(
    model: StageModel,
    batches: Sequence[MicroBatch],
    groups: ParallelGroups,
    computed: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Run every micro-batch; afterwards gradients are those of the mean loss over the global batch's targets.

    `calculate_per_token_loss` makes Megatron sum the token losses and divide, once, by the number of targets of
    the whole global batch, so neither micro-batches nor ranks weigh in.

    Args:
        computed: called when this rank has done its part, before it waits for the others' gradients.

    Returns:
        The mean loss (NaN without a target) and the number of targets of the global batch, the same on every rank.
    """

    def finalize(*args: Any, **named: Any) -> None:
        computed()
        finalize_model_grads(*args, **named)

    model.config.finalize_model_grads_func = finalize
    model.config.no_sync_func = model.accumulating
    losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, model),
        data_iterator=[iter(batches) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1] * groups.cp.size,
        micro_batch_size=1,
        forward_only=False,
    )
    return _reduce(losses, groups, batches[0].tokens.device)


def _forward_step(
    model: StageModel, data: Iterator[MicroBatch], chunk: torch.nn.Module
) -> tuple[Tensor, Any]:
    batch = next(data)
    if model.keeps_attention and batch.documents.kept is None:
        batch.documents.kept = {}
    with model.offload or nullcontext():
        output = chunk(
            batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.documents
        )
    return output, partial(_loss, batch.num_targets)


def _loss(num_targets: int, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, int]]:
    total = losses.sum()
    return total, torch.tensor(num_targets, dtype=torch.int), (total.detach(), num_targets)


def _reduce(
    losses: list[tuple[Tensor, int]], groups: ParallelGroups, device: torch.device
) -> tuple[float, int]:
    """Sum over micro-batches, then over the ranks that saw other tokens, then hand on from the last stage."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for loss, num_targets in losses:
        totals[0] += loss  # on the device: nothing waits for it
        totals[1] += num_targets
    # Only the last pipeline stage has losses: the sum over stages is a broadcast.
    for axis in (groups.dp_cp, groups.pp):
        dist.all_reduce(totals, group=axis.group)
    num_targets = int(totals[1])
    return float(totals[0]) / num_targets if num_targets else math.nan, num_targets

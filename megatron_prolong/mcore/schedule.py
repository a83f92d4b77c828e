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
    tell: Callable[[], Sequence[float]] = tuple,
) -> tuple[float, int, list[float]]:
    """Run every micro-batch; afterwards gradients are those of the mean loss over the global batch's targets.

    `calculate_per_token_loss` makes Megatron sum the token losses and divide, once, by the number of targets of
    the whole global batch, so neither micro-batches nor ranks weigh in.

    Args:
        computed: called when this rank has done its part, before it waits for the others' gradients.
        tell: called after that, for what this rank has to tell the others: as many numbers as theirs.

    Returns:
        The mean loss (NaN without a target) and the number of targets of the global batch, and the sums over all
        ranks of what they told; the same on every rank.
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
    return _reduce(losses, tell, groups, batches[0].tokens.device)


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
    losses: list[tuple[Tensor, int]],
    tell: Callable[[], Sequence[float]],
    groups: ParallelGroups,
    device: torch.device,
) -> tuple[float, int, list[float]]:
    """Sum over micro-batches, then over the ranks that saw other tokens, then hand on from the last stage.

    What is told goes along: as a message of its own it would make all ranks wait for each other once more.
    """
    own = torch.zeros(2, dtype=torch.float64, device=device)
    for loss, num_targets in losses:
        own[0] += loss  # on the device: nothing waits for it
        own[1] += num_targets
    totals = torch.cat([own, own.new_tensor(tell())])
    # Only the last pipeline stage has losses: the sum over stages is a broadcast.
    for axis in (groups.dp_cp, groups.pp):
        dist.all_reduce(totals, group=axis.group)
    if groups.tp.size > 1:  # these ranks have the same losses
        dist.all_reduce(totals[2:], group=groups.tp.group)
    loss, targets, *told = totals.tolist()
    return (loss / targets if targets else math.nan), int(targets), told

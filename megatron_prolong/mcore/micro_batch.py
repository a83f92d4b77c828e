"""This rank's share of a micro-batch on its device: what one forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prolong.data.batch import NO_LABEL, PackedBatch
from megatron_prolong.mcore.attention import Documents
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.model.context_parallel import ContextParallel
from megatron_prolong.model.context_plan import ContextPlan
from megatron_prolong.recipe.schema import Layout


@dataclass(frozen=True)
class MicroBatch:
    """Tokens, labels and positions [1, T] int64 of this context-parallel rank, and the documents they belong to.

    A label is -100 where no loss is taken; `num_targets` counts the others, on this rank.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Documents
    num_targets: int


def micro_batch(
    packed: PackedBatch,
    *,
    groups: ParallelGroups,
    layout: Layout,
    device: torch.device,
    split_threshold_tokens: int = 0,
    owners: Sequence[int] = (),
    token_multiple: int = 1,
) -> MicroBatch:
    """Slice a packed batch for this rank: zigzag over context-parallel ranks, padded for sequence parallelism.

    Args:
        packed: on CPU.
        split_threshold_tokens: documents shorter than this stay whole on one context-parallel rank.
        owners: the ranks of those, in their order; without, they are dealt out by tokens.
        token_multiple: pad the tokens of each rank to a multiple of this (FP8 matrix products work on tiles).
    """
    multiple = token_multiple * (layout.tp if layout.sequence_parallel else 1)
    plan = ContextPlan.build(
        packed.cu_seqlens.tolist(),
        cp_size=groups.cp.size,
        multiple=multiple,
        split_threshold_tokens=split_threshold_tokens,
        owners=owners,
    )
    context = None
    if groups.cp.size > 1:
        context = ContextParallel(
            plan, groups.cp.rank, groups.cp.group, layout.cp_exchange, groups.hierarchical_cp
        )
    labels = plan.take(packed.labels_T, groups.cp.rank, NO_LABEL)
    return MicroBatch(
        tokens=plan.take(packed.tokens_T, groups.cp.rank, 0).unsqueeze(0).to(device, non_blocking=True),
        labels=labels.unsqueeze(0).to(device, non_blocking=True),
        positions=plan.take(packed.positions_T, groups.cp.rank, 0).unsqueeze(0).to(device, non_blocking=True),
        documents=Documents(cu_seqlens=plan.local_cu_seqlens(groups.cp.rank), context=context),
        num_targets=int((labels != NO_LABEL).sum()),
    )

"""Share a global batch out: which documents this rank trains on, in which micro-batch.

The packed sequences only say which documents belong to the batch; documents go to ranks by modelled cost
(data/balance). Every rank computes the same assignment from the document lengths, so nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prolong.data.balance import EMPTY, Assignment, CostModel, assign
from megatron_prolong.data.batch import collate_pieces
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.mcore.micro_batch import MicroBatch, micro_batch
from megatron_prolong.recipe.schema import Layout


def share_out(
    sequences: Sequence[PackedSequence],
    groups: ParallelGroups,
    micro_batch_tokens: int,
    cost: CostModel,
) -> Assignment:
    """Assign the documents of a global batch to data-parallel ranks and micro-batches."""
    return assign(
        [sequence.document_lengths for sequence in sequences],
        dp=groups.dp.size,
        cp=groups.cp.size,
        # A document of a whole micro-batch, split, is padded to a multiple of 2·cp.
        budget_tokens=2 * -(-micro_batch_tokens // (2 * groups.cp.size)),
        cost=cost,
        equal_micro_batches=groups.pp.size > 1,
    )


def micro_batches(
    sequences: Sequence[PackedSequence],
    assignment: Assignment,
    groups: ParallelGroups,
    layout: Layout,
    device: torch.device,
    token_multiple: int = 1,
) -> list[MicroBatch]:
    """This rank's micro-batches, on its device."""
    plans = list(assignment[groups.dp.rank])
    if layout.virtual_pp > 1:
        # The interleaved schedule takes micro-batches in groups of pp; empty ones fill up the last group.
        plans += [EMPTY] * (-len(plans) % layout.pp)
    batches = []
    for plan in plans:
        chosen = [sequences[index.sample].piece(index.document) for index in plan.documents]
        packed = collate_pieces(chosen, None if chosen else 1)
        batches.append(
            micro_batch(
                packed,
                groups=groups,
                layout=layout,
                device=device,
                split_threshold_tokens=plan.share.split_threshold_tokens,
                owners=plan.share.owners,
                token_multiple=token_multiple,
            )
        )
    return batches

"""Share a global batch out: which documents this rank trains on, in which micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_prolong.data.batch import collate
from megatron_prolong.data.packed import PackedSequence
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.mcore.micro_batch import MicroBatch, micro_batch
from megatron_prolong.recipe.schema import Layout


def micro_batches(
    sequences: Sequence[PackedSequence],
    groups: ParallelGroups,
    layout: Layout,
    sequence_length: int,
    device: torch.device,
) -> list[MicroBatch]:
    """This rank's micro-batches of the global batch `sequences`."""
    batches = []
    for sequence in sequences[groups.dp.rank :: groups.dp.size]:
        packed = collate(sequence, sequence_length)
        batches.append(
            micro_batch(
                packed.tokens_T,
                packed.labels_T,
                packed.positions_T,
                packed.cu_seqlens,
                groups=groups,
                layout=layout,
                device=device,
            )
        )
    return batches

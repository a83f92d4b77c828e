"""The boxes in which a checkpoint holds a rank's flat shard of the optimizer are the shard, wherever it is cut."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_prolong.mcore.optimizer_shards import _shards


@pytest.mark.parametrize("shape", [(5, 7), (12,), (1, 4), (4, 1)], ids=str)
def test_the_boxes_of_a_shard_hold_its_elements_at_their_places(shape):
    numbers = torch.arange(float(torch.Size(shape).numel()))
    weight = ShardedTensor.from_rank_offsets(
        "weight", numbers.view(shape), replica_id=(0, 0, 1), allow_shape_mismatch=True
    )
    for start, stop in combinations(range(len(numbers) + 1), 2):
        whole = torch.full(shape, -1.0)
        for shard in _shards(weight, start, {"optimizer.state.param.": numbers[start:stop]}):
            assert shard.key == "optimizer.state.param.weight" and shard.replica_id == (0, 0, 0)
            assert shard.allow_shape_mismatch  # another layout may pad the vocabulary otherwise
            corner, sizes = shard.global_offset, shard.local_shape
            place = whole[tuple(slice(at, at + size) for at, size in zip(corner, sizes, strict=True))]
            assert (place == -1).all()
            place.copy_(shard.data)
        assert torch.equal(whole.flatten()[start:stop], numbers[start:stop])
        assert (whole == -1).sum() == len(numbers) - (stop - start)

"""The distributed optimizer's weights and moments, saved from and loaded to where they are: every rank its shard.

Megatron's own way to save them for any layout (DistributedOptimizer.sharded_param_state_fully_reshardable) first
gathers the fp32 weights and both moments of a model-parallel rank on the host of every data-parallel rank, 12 bytes
per parameter each, while training waits; to load them, every rank reads all of them again. Here a rank's flat shard
of a weight is cut into boxes of the weight's rows and columns, at most three, which torch's checkpoint format takes
as they are and fills from whatever boxes another layout has written. Names and global shapes stay, so Megatron's
own loader reads the result too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

SHARDING_TYPE = "fully_reshardable"
# Adam moments are saved per weight, in the weight's own shape, so that any layout can read them back.
# Handed out as copies: Megatron writes the layout's process group into the dict it is given.
METADATA = {"distrib_optim_sharding_type": SHARDING_TYPE, "chained_optim_avoid_prefix": True}
_STATES = ("param", "exp_avg", "exp_avg_sq")


def optimizer_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, *, with_weights: bool = False
) -> ShardedStateDict:
    """What a checkpoint holds of this rank's optimizer, as references: to be written, or to be read into.

    Args:
        model_state: the model's sharded_state_dict, which says where each weight belongs.
        with_weights: add the model's weights, rounded from the distributed optimizer's fp32 ones.
    """
    (single,) = getattr(optimizer, "chained_optimizers", [optimizer])
    _begin(single)
    if not isinstance(single, DistributedOptimizer):
        assert not with_weights
        return optimizer.sharded_state_dict(model_state, metadata=dict(METADATA))
    weights = {id(value.data): value for value in nested_values(model_state)}
    shards = [
        shard
        for buffer in single.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for weight, ranges in bucket["param_map"].items()
        for shard in _shards(
            weights[id(weight)], ranges["param"].start, _states(single, weight, with_weights)
        )
    ]
    return {
        **single.state_dict(),
        "param_state": dict(enumerate(shards)),
        "param_state_sharding_type": SHARDING_TYPE,
    }


def _begin(optimizer: MegatronOptimizer) -> None:
    """Zero moments and step count where every step so far was skipped: Adam makes them in its first update."""
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    for group in optimizer.param_groups:
        group.setdefault("step", 0)


def _states(
    optimizer: DistributedOptimizer, weight: torch.Tensor, with_weight: bool
) -> dict[str, torch.Tensor]:
    """Before the weight's own key → this rank's flat shard of what is saved under the two."""
    all_states = optimizer._get_main_param_and_optimizer_states(weight)
    states = {f"optimizer.state.{name}.": all_states[name] for name in _STATES}
    return {**states, "": all_states["param"].to(weight.dtype)} if with_weight else states


def _shards(
    weight: ShardedTensor | ShardedTensorFactory, start: int, states: Mapping[str, torch.Tensor]
) -> Iterator[ShardedTensor]:
    """The boxes of a weight's states, which are flat and begin at element `start` of the weight on this rank."""
    # A factory cuts along the first axis (gate and up projection), so its parts follow each other in flat memory.
    parts = nested_values(weight.build()) if isinstance(weight, ShardedTensorFactory) else [weight]
    stop, part_start = start + states["optimizer.state.param."].numel(), 0
    for part in parts:
        part_stop = part_start + math.prod(part.local_shape)
        position = max(start, part_start)
        for offsets, sizes in _boxes(
            part.local_shape, position - part_start, min(stop, part_stop) - part_start
        ):
            count = math.prod(sizes)
            for prefix, flat in states.items():
                yield _shard(part, prefix, flat[position - start :][:count], offsets, sizes)
            position += count
        part_start = part_stop


def _shard(
    part: ShardedTensor, prefix: str, flat: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> ShardedTensor:
    before = part.prepend_axis_num  # stacked layers: the axis is in the file but not in the weight
    sizes = (1,) * before + sizes
    return ShardedTensor(
        key=prefix + part.key,
        data=flat.view(sizes),
        dtype=flat.dtype,
        local_shape=sizes,
        global_shape=part.global_shape,
        global_offset=tuple(map(sum, zip(part.global_offset, (0,) * before + offsets, strict=True))),
        axis_fragmentations=None,
        # Data-parallel ranks, last in Megatron's triple, hold different shards: none is a replica.
        replica_id=(*part.replica_id[:-1], 0),
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that hold the flat elements start … stop of a vector or matrix, in order."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    _, columns = shape
    while start < stop:
        row, column = divmod(start, columns)
        if column == 0 and stop - start >= columns:
            sizes = ((stop - start) // columns, columns)
        else:
            sizes = (1, min(columns - column, stop - start))
        yield (row, column), sizes
        start += math.prod(sizes)

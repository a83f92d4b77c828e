"""The weights of one rank, and the elements and bytes that Megatron keeps for them."""

from __future__ import annotations

import math

from megatron_prolong.plan.job import Job
from megatron_prolong.recipe.counts import layer_weights


def stage_weights(job: Job, pp_rank: int) -> list[int]:
    """Elements of every weight on a rank of pipeline stage `pp_rank`.

    The first stage has the embedding, the last one the final norm and the output layer; tied embeddings are
    held once when both are the same stage and twice otherwise.
    """
    shape, layout = job.shape, job.layout
    sizes = list(layer_weights(shape, layout.tp).values()) * job.stage_layers[pp_rank]
    vocabulary = job.vocab_rows * shape.hidden_size
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    if first:
        sizes.append(vocabulary)
    if last:
        sizes.append(shape.hidden_size)
        if not (shape.tie_embeddings and first):
            sizes.append(vocabulary)
    return sizes


def fp8_weights(job: Job, pp_rank: int) -> int:
    """Elements whose products are in fp8: the linears of all layers but the model's first and last."""
    if job.precision != "fp8":
        return 0
    layers = job.stage_layers[pp_rank] - (pp_rank == 0) - (pp_rank == job.layout.pp - 1)
    linears = (size for name, size in layer_weights(job.shape, job.layout.tp).items() if "norm" not in name)
    return max(layers, 0) * sum(linears)


def buffer_elements(job: Job, weights: list[int]) -> int:
    """Elements of the buffer that holds a rank's weights (or gradients), with Megatron's padding."""
    if not job.layout.distributed_optimizer:
        return sum(weights)
    padded = sum(_round_up(size, 64) for size in weights)
    return _round_up(padded, math.lcm(job.dp * job.layout.cp, 128))


def optimizer_bytes(job: Job, elements: int) -> int:
    """Bytes of optimizer state of one rank (the largest shard) for a buffer of `elements`."""
    per_element = 8 if job.precision == "fp32" else 12
    shards = job.dp * job.layout.cp if job.layout.distributed_optimizer else 1
    return elements // shards * per_element


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Bytes that a rank sends in one step, by what they are for.

Counted as a ring sends them: all-gather and reduce-scatter (n-1)/n of the whole, all-reduce twice that,
all-to-all (n-1)/n of what a rank holds, point-to-point all of it. A few scalars per step are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prolong.plan.job import Job
from megatron_prolong.plan.memory import a2a_repeats
from megatron_prolong.plan.weights import buffer_elements, fp8_weights, stage_weights


@dataclass(frozen=True)
class StepVolume:
    """Bytes sent by one rank in one step.

    Attributes:
        tensor: the residual stream and its gradient between tensor-parallel ranks, the loss's reductions, and
            the gradients of the norms under sequence parallelism.
        context: keys, values and gradients between context-parallel ranks, every document split.
        pipeline: the residual stream and its gradient between pipeline stages.
        data: gradients (fp32) and weights between the ranks that hold the same weights.
    """

    tensor: int
    context: int
    pipeline: int
    data: int


def step_volume(job: Job, pp_rank: int) -> StepVolume:
    """What a rank of pipeline stage `pp_rank` sends in one step."""
    return StepVolume(
        tensor=round(_tensor(job, pp_rank)),
        context=round(context_bytes(job) * job.micro_batches),
        pipeline=_pipeline(job, pp_rank),
        data=round(_data(job, pp_rank)),
    )


def _tensor(job: Job, pp_rank: int) -> float:
    """Per layer and micro-batch, in units of an all-gather of the residual stream.

    With sequence parallelism the forward gathers twice and scatters twice; the backward does the same for the
    gradients and gathers the inputs of both column-parallel products again. Without, two all-reduces each way.
    Recomputing a layer, or the MLP alone, repeats its forward.
    """
    layout, shape = job.layout, job.shape
    if layout.tp == 1:
        return 0.0
    unit = (layout.tp - 1) / layout.tp * job.hidden_bytes
    split = layout.sequence_parallel
    per_layer = (4 + 6 if split else 8) + 4 * job.exchanged_again
    layers = job.stage_layers[pp_rank]
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    # The embedding is scattered (or reduced) forward and gathered backward; the loss the other way round.
    ends = 2 * first + 2 * last
    loss = 3 * 2 * (layout.tp - 1) / layout.tp * job.rank_tokens * 4 * last
    norms = 0.0
    if split:
        elements = 2 * layers * shape.hidden_size + shape.hidden_size * last
        norms = 2 * (layout.tp - 1) / layout.tp * elements * 4
    return job.micro_batches * ((per_layer * layers + ends) * unit + loss) + norms


def context_bytes(job: Job) -> float:
    """Bytes that a rank sends to its context-parallel ranks for one micro-batch."""
    layout, shape, e = job.layout, job.shape, job.element_bytes
    if layout.cp == 1:
        return 0.0
    t, again = job.rank_tokens, job.attention_again
    keys_values = 2 * t * shape.num_kv_heads * shape.head_dim // layout.tp
    if layout.cp_exchange == "a2a":
        queries_output = 2 * t * shape.num_heads * shape.head_dim // layout.tp
        moved = (queries_output + a2a_repeats(job) * keys_values) * (layout.cp - 1) / layout.cp
        per_layer = (2 + again) * e * moved
    elif layout.cp_exchange == "all_gather":
        per_layer = ((2 + again) * e + 4) * (layout.cp - 1) * keys_values
    else:  # the ring's gradients make one step more, to come home
        per_layer = ((2 + again) * e * (layout.cp - 1) + 4 * layout.cp) * keys_values
    return per_layer * job.longest_stage_layers


def _pipeline(job: Job, pp_rank: int) -> int:
    """Forward to the next model chunk and backward to the one before, wherever that is another rank."""
    layout = job.layout
    if layout.pp == 1:
        return 0
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    hops = 2 * layout.virtual_pp - first - last
    return job.micro_batches * hops * job.residual_bytes


def _data(job: Job, pp_rank: int) -> float:
    layout = job.layout
    ranks = job.dp * layout.cp
    elements = buffer_elements(job, stage_weights(job, pp_rank))
    return (ranks - 1) / ranks * (4 * elements + gathered_weight_bytes(job, elements, pp_rank))


def gathered_weight_bytes(job: Job, elements: int, pp_rank: int) -> int:
    """What an update of `elements` weights of a pipeline stage gathers; else the second half of an all-reduce."""
    if not job.layout.distributed_optimizer:
        return 4 * elements
    return elements * job.element_bytes - (fp8_weights(job, pp_rank) if job.fp8_parameters else 0)

"""Seconds of a training step, part by part.

A document of n tokens costs a data-parallel rank `linear·n + quadratic·n²` (matrix products, elementwise kernels
and exchanges grow with its tokens, attention with their square), and the engine deals documents, not packed
sequences, to the ranks by that cost (data/balance). The step lasts as long as the rank with the largest sum,
plus the pipeline's filling and draining, plus what cannot hide behind computation:

    matmul         executed FLOPs / reachable FLOP/s
    attention      likewise, by Σ len²
    elementwise    bytes of norms, residuals, rotary embedding and SwiGLU / reachable memory bandwidth
    tensor         all-gathers and reduce-scatters of the residual stream, all exposed
    context        exchange of keys and values of the documents that do not fit one context-parallel rank;
                   all_gather and a2a exposed, p2p where it is longer than the document's attention
    pipeline       filling and draining, (pp-1)/virtual_pp times the longest micro-batch, the wait for the empty
                   micro-batches that fill up an interleaved schedule, and the hand-over of the residual stream
                   from stage to stage
    imbalance      slowest data-parallel rank minus the mean
    gradients      reduce-scatter of fp32 gradients and all-gather of weights, beyond the computation of the
                   last (first) micro-batch that they overlap with
    optimizer      bytes of Adam's update / memory bandwidth
    offload        activations to the host and back, beyond the forward and the backward that they overlap with
    overhead       launch gaps, throttling, imperfect overlap: all of the above is SUSTAINED of the step
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from megatron_prolong.plan.flops import model_flops
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import BatchDocuments, Lengths
from megatron_prolong.plan.memory import gpu_kernels, parkable_by_chunk
from megatron_prolong.plan.volume import context_bytes, gathered_weight_bytes
from megatron_prolong.plan.weights import stage_weights
from megatron_prolong.recipe.counts import ForwardFlops

Seconds = NDArray[np.float64]

# Attention's backward over its forward: five products instead of two, as the scores are made again (Dao 2023,
# section 3.1).
FLASH_BACKWARD = 2.5
# A ring attends in cp pieces and merges them: 90% of the speed of one call (zigzag, 8 GPUs;
# zhuzilin/ring-flash-attention, README).
RING_EFFICIENCY = 0.9
# What whole training runs reach of the sum of their parts. The one number that is fitted here: the median over
# the published runs in benchmarks/plan/facts.py, of seven programs, that the parts alone overestimate.
SUSTAINED = 0.8


@dataclass(frozen=True)
class Rates:
    """What documents cost a rank of the slowest pipeline stage, forward and backward.

    Attributes:
        matmul, elementwise, tensor: seconds per token.
        context: seconds per token of a document that is split over the context-parallel ranks.
        attention: seconds per token² of a document.
        local_tokens: longest document that stays on one context-parallel rank.
        overlaps: the exchange runs behind the document's attention.
    """

    matmul: float
    elementwise: float
    tensor: float
    context: float
    attention: float
    local_tokens: int
    overlaps: bool

    @property
    def linear(self) -> float:
        """Seconds per token of any document."""
        return self.matmul + self.elementwise + self.tensor

    def exchange(self, lengths: Lengths) -> Seconds:
        """Exposed exchange of each document."""
        moved = np.asarray(self.context * lengths * (lengths > self.local_tokens), dtype=np.float64)
        return np.maximum(moved - self.attention * lengths**2, 0.0) if self.overlaps else moved

    def seconds(self, lengths: Lengths) -> Seconds:
        """Seconds of each document."""
        return self.linear * lengths + self.attention * lengths**2 + self.exchange(lengths)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, as an average over the sampled batches."""

    matmul: float
    attention: float
    elementwise: float
    tensor: float
    context: float
    pipeline: float
    imbalance: float
    gradients: float
    optimizer: float
    offload: float
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name → seconds, in the order of the fields."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def rates(job: Job, gpu: Gpu) -> Rates:
    """What one document costs, on the slowest pipeline stage."""
    shape, layout = job.shape, job.layout
    flops = ForwardFlops.of(shape)
    weight_precision = "bf16" if job.precision == "fp8" else job.precision
    of_layers = (3 + job.recomputed_share) * flops.layers_per_token
    if job.recompute == "selective":
        of_layers += flops.mlp_per_token
    share = 1 / (shape.num_layers * layout.tp * layout.cp)  # of one layer
    layer = of_layers * share / gpu.matmul_flops(job.precision)
    # The last stage also has the output layer, never recomputed, and the others wait for it.
    output = 3 * flops.output_per_token / (layout.tp * layout.cp) / gpu.matmul_flops(weight_precision)
    matmul = max(job.longest_stage_layers * layer, job.stage_layers[-1] * layer + output)
    kernels = job.long_attention  # long documents have nearly all the pairs
    forward = (1 + job.attention_again) / gpu.attention_flops(kernels, backward=False)
    backward = FLASH_BACKWARD / gpu.attention_flops(kernels, backward=True)
    attention = flops.attention_per_pair * job.longest_stage_layers * share * (forward + backward)
    is_ring = layout.cp > 1 and "p2p" in layout.cp_exchange
    return Rates(
        matmul=matmul,
        elementwise=_elementwise_seconds(job, gpu) / job.micro_batch_length,
        tensor=_tensor_seconds(job, gpu) / job.micro_batch_length,
        context=_context_seconds(job, gpu) / job.micro_batch_length,
        attention=attention / RING_EFFICIENCY if is_ring else attention,
        local_tokens=job.rank_tokens,
        overlaps=is_ring,
    )


def step_time(job: Job, gpu: Gpu, batches: Sequence[BatchDocuments]) -> StepTime:
    """Time of a step, averaged over some global batches."""
    one, layout = rates(job, gpu), job.layout
    loads = [RankLoads.of(one, batch, job.dp) for batch in batches]
    mean = float(np.mean([load.mean for load in loads]))
    slowest = float(np.mean([load.slowest for load in loads]))
    longest = float(np.mean([max(load.dearest, load.mean / job.micro_batches) for load in loads]))
    exchange = float(np.mean([load.exchange for load in loads]))
    tokens = job.batch_tokens / job.dp
    # Interleaved, micro-batches come in groups of pp, and all chunks but one wait for the whole last group.
    empty = -job.micro_batches % layout.pp
    pipeline = (layout.pp - 1 + (layout.virtual_pp - 1) * empty) / layout.virtual_pp * longest
    time = StepTime(
        matmul=one.matmul * tokens,
        attention=mean - one.linear * tokens - exchange,
        elementwise=one.elementwise * tokens,
        tensor=one.tensor * tokens,
        context=exchange,
        pipeline=pipeline + _hand_over_seconds(job, gpu) * job.micro_batches,
        imbalance=slowest - mean,
        gradients=_gradient_seconds(job, gpu, mean / job.micro_batches),
        optimizer=_optimizer_seconds(job, gpu),
        offload=_offload_seconds(job, gpu, mean / job.micro_batches) * job.micro_batches,
    )
    return replace(time, overhead=time.total * (1 / SUSTAINED - 1))


@dataclass(frozen=True)
class RankLoads:
    """Seconds of the data-parallel ranks for one global batch whose documents are dealt out by cost.

    Attributes:
        mean, slowest: over the ranks.
        dearest: one document's.
        exchange: exposed exchange of a rank, on average.
    """

    mean: float
    slowest: float
    dearest: float
    exchange: float

    @classmethod
    def of(cls, one: Rates, batch: BatchDocuments, dp: int) -> RankLoads:
        """Longest processing time first (Graham 1969); short documents fill the gaps."""
        costs = one.seconds(batch.long)
        total = float(costs.sum()) + one.linear * batch.short_tokens + one.attention * batch.short_pairs
        ranks = [0.0] * dp
        for cost in sorted(costs.tolist(), reverse=True):
            heapq.heapreplace(ranks, ranks[0] + cost)
        return cls(
            mean=total / dp,
            slowest=max(total / dp, *ranks),
            dearest=float(costs.max(initial=0.0)),
            exchange=float(one.exchange(batch.long).sum()) / dp,
        )


def tokens_per_second_per_gpu(job: Job, time: StepTime) -> float:
    """Training throughput."""
    return job.batch_tokens / time.total / job.world_size


def mfu(job: Job, gpu: Gpu, time: StepTime, batches: Sequence[BatchDocuments]) -> float:
    """Model FLOPs (document-aware) over the bf16 peak of all GPUs."""
    pairs = float(np.mean([batch.pairs for batch in batches]))
    needed = model_flops(job.shape, job.batch_tokens, pairs)
    return needed / (time.total * job.world_size * gpu.peak_flops["bf16"])


def _elementwise_seconds(job: Job, gpu: Gpu) -> float:
    """Norms (read, write: 2 each), residual sums (3 each), rotary embedding (about 3 passes) and SwiGLU."""
    shape, tp, e = job.shape, job.layout.tp, job.element_bytes
    residual = 10 * job.residual_bytes
    heads = (shape.num_heads + shape.num_kv_heads) * shape.head_dim // tp
    rotary = 6 * job.rank_tokens * heads * e
    swiglu = 3 * job.rank_tokens * shape.ffn_hidden_size // tp * e
    forwards = 1 + job.recomputed_share
    moved = (forwards + 2) * (residual + rotary + swiglu) * job.longest_stage_layers
    return moved / (gpu.memory_bandwidth * gpu.efficiency.memory)


def _tensor_seconds(job: Job, gpu: Gpu) -> float:
    """Per layer and pass, two all-gathers and two reduce-scatters (or two all-reduces: the same bytes), and one of
    each for an MLP that is recomputed. What the backward gathers again travels behind its products."""
    tp = job.layout.tp
    if tp == 1:
        return 0.0
    one = (tp - 1) / tp * job.hidden_bytes
    rounds = 2 + job.exchanged_again
    volume = 4 * rounds * one * job.longest_stage_layers + 2 * one
    return volume / gpu.bandwidth(tp, stride=1)


def _context_seconds(job: Job, gpu: Gpu) -> float:
    """The exchange of one micro-batch whose documents are all split."""
    return context_bytes(job) / gpu.bandwidth(job.layout.cp, stride=job.layout.tp)


def _hand_over_seconds(job: Job, gpu: Gpu) -> float:
    """The residual stream (and its gradient) of a micro-batch to the next stage, once per model chunk."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    volume = 2 * layout.virtual_pp * job.residual_bytes
    return volume / gpu.bandwidth(layout.pp, stride=job.world_size // layout.pp)


def _gradient_seconds(job: Job, gpu: Gpu, micro_batch_seconds: float) -> float:
    """Exposed part of the gradients' reduce-scatter (fp32) and the weights' all-gather, once per step."""
    layout = job.layout
    ranks = job.dp * layout.cp
    if ranks == 1:
        return 0.0
    elements, pp_rank = max((sum(stage_weights(job, rank)), rank) for rank in range(layout.pp))
    bandwidth = gpu.bandwidth(ranks, stride=layout.tp)
    share = (ranks - 1) / ranks / bandwidth
    backward = 0.6 * micro_batch_seconds  # backward takes about 2/3 of a micro-batch; the tail is exposed
    forward = 0.3 * micro_batch_seconds
    gathered = gathered_weight_bytes(job, elements, pp_rank)
    return max(0.0, 4 * elements * share - backward) + max(0.0, gathered * share - forward)


def _offload_seconds(job: Job, gpu: Gpu, micro_batch_seconds: float) -> float:
    """Exposed part of the copies of one micro-batch, on the pipeline stage with most layers."""
    if not job.offload:
        return 0.0
    chunk = parkable_by_chunk(job, job.longest_stage_layers, gpu_kernels(job)) / gpu.host_bandwidth
    return max(0.0, chunk - micro_batch_seconds / 3) + max(0.0, chunk - micro_batch_seconds * 2 / 3)


def _optimizer_seconds(job: Job, gpu: Gpu) -> float:
    """Norm and scaling of the gradients, then Adam over the shard: read 16, write 14 bytes per element."""
    layout = job.layout
    elements = max(sum(stage_weights(job, rank)) for rank in range(layout.pp))
    shards = job.dp * layout.cp if layout.distributed_optimizer else 1
    moved = 2 * 4 * elements / shards + 30 * elements / shards + 4 * elements  # zeroing the whole buffer
    return moved / (gpu.memory_bandwidth * gpu.efficiency.memory)

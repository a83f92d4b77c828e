"""Other people's programs in the planner's terms, to judge its constants against what they report.

Fully sharded programs (FSDP, ZeRO-3) are no layout of ours: weights, gradients and optimizer are divided by all
ranks, and every micro-batch gathers the weights (forward, and again in the backward) and scatters the
gradients. The rest (matrix products, attention, activations, exchanges) is the planner's own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_prolong.plan import memory, time
from megatron_prolong.plan.hardware import Gpu
from megatron_prolong.plan.job import Job
from megatron_prolong.plan.lengths import Lengths
from megatron_prolong.recipe.counts import layer_weights, num_parameters


@dataclass(frozen=True)
class Sharded:
    """A fully sharded program.

    Attributes:
        job: tp 1, pp 1, cp = its sequence-parallel degree (Ulysses is a2a, a ring is p2p).
        master_bytes: bytes per weight of sharded weights, gradients and optimizer on the GPU.
        whole_logits: bytes per logit when all of a micro-batch's logits exist at once; 0 when chunked.
        offload_inputs: the layers' inputs are kept in host memory.
        tiled_mlp: the MLP runs in pieces of the sequence.
    """

    job: Job
    master_bytes: float = 16.0
    whole_logits: float = 0.0
    offload_inputs: bool = False
    tiled_mlp: bool = False

    def sequence_seconds(self, gpu: Gpu, lengths: Lengths) -> float:
        """Seconds of one packed sequence on its sequence-parallel group."""
        compute = float(time.rates(self.job, gpu).seconds(lengths).sum())
        weights = num_parameters(self.job.shape)
        world = self.job.world_size
        bandwidth = gpu.bandwidth(world, stride=1)
        exchange = (2 + 2 + 4) * weights * (world - 1) / world / bandwidth  # bf16 twice, fp32 gradients
        return max(compute, exchange)

    def step_seconds(self, gpu: Gpu, batches: list[list[Lengths]], *, sort: bool) -> float:
        """Mean seconds of a step: every micro-batch waits for its slowest group, because all gather together.

        Args:
            batches: document lengths of each packed sequence of some steps.
            sort: each group orders its sequences by cost, as ProLong does, so that like meets like.
        """
        totals = []
        for step in batches:
            seconds = np.array([self.sequence_seconds(gpu, lengths) for lengths in step])
            by_group = seconds.reshape(-1, self.job.dp)  # [micro-batch, group]
            by_group = np.sort(by_group, axis=0) if sort else by_group
            totals.append(by_group.max(axis=1).sum())
        return float(np.mean(totals)) / time.SUSTAINED

    def needed_bytes(self, gpu: Gpu) -> float:
        """GPU memory of a rank with reserve and fragmentation."""
        job = self.job
        weights = num_parameters(job.shape)
        resident = self.master_bytes * weights / job.world_size
        layer = sum(layer_weights(job.shape, 1).values())
        gathered = 2 * layer * 2 + layer * 4  # two layers of bf16 weights (prefetch) and one of gradients
        vocabulary = job.vocab_rows * job.shape.hidden_size * (2 + 2 + 4)
        kept = job.shape.num_layers * memory.kept_by_layer(job, memory.GPU_KERNELS)
        inputs = 0 if self.offload_inputs else kept
        logits = self.whole_logits * job.rank_tokens * job.vocab_rows
        loss = logits or memory.loss_working(job)
        working = max(self._layer_working(), loss)
        parts = resident + gathered + vocabulary + inputs + working + memory.exchange_bytes(job)
        return parts * (1 + gpu.fragmentation) + gpu.reserve_bytes

    def _layer_working(self) -> int:
        job, kernels = self.job, memory.GPU_KERNELS
        if not self.tiled_mlp:
            return memory.layer_working(job, kernels)
        saved = memory.saved_by_layer(job, kernels)
        attention = sum(saved.values()) - saved["fc1"] - saved["activation"]
        attention -= memory.kept_by_layer(job, kernels)
        return attention + memory.attention_gradients(job, kernels) + saved["residual"]


def longest(program: Sharded, gpu: Gpu, host_limit: int = 2**26) -> int:
    """The longest sequence that fits, in tokens, to 1K per rank."""
    low, high = 1, host_limit // 1024
    while low < high:
        middle = (low + high + 1) // 2
        job = replace(program.job, sequence_length=middle * 1024)
        fits = replace(program, job=job).needed_bytes(gpu) <= gpu.memory_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * 1024

"""Predicted bytes against what ranks of our own program hold and send on CPU, at every kind of layout.

Weights and gradients to the byte. Optimizer state to the byte but for the padding of Megatron's buffers, which
has no state. Activations: all storages that autograd keeps, the micro-batches' own tensors and the outputs of
pipeline stages not freed yet, when a forward has just ended; within 1% (a few numbers per token are not modelled).
What a rank sends is counted at the process groups; within 0.1% (a few scalars and shapes are not modelled).
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plan_shapes import TINY

from megatron_prolong.plan.job import Job
from megatron_prolong.plan.memory import CPU_KERNELS, rank_memory
from megatron_prolong.plan.volume import step_volume
from megatron_prolong.plan.weights import stage_weights
from megatron_prolong.recipe.schema import Layout

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from measured import Measured, measure
from rank_pool import RankPool

LENGTH, SEQUENCES = 256, 4
CASES = {
    "one rank": (1, {}, "fp32", "none"),
    "one rank, bf16": (1, {}, "bf16", "none"),
    "one rank, MLP recomputed": (1, {}, "bf16", "selective"),
    "one rank, all recomputed": (1, {}, "bf16", "full"),
    "one rank, all but attention": (1, {}, "bf16", "all_but_attention"),
    "cp2 p2p, all but attention": (2, {"cp": 2, "cp_exchange": "p2p"}, "fp32", "all_but_attention"),
    "cp2 a2a, all but attention": (2, {"cp": 2, "cp_exchange": "a2a"}, "bf16", "all_but_attention"),
    "tp2 with sequence parallel": (2, {"tp": 2}, "bf16", "none"),
    "tp2, MLP recomputed": (2, {"tp": 2}, "bf16", "selective"),
    "tp2 without": (2, {"tp": 2, "sequence_parallel": False}, "fp32", "full"),
    "cp2 all_gather": (2, {"cp": 2, "cp_exchange": "all_gather"}, "fp32", "none"),
    "cp2 p2p": (2, {"cp": 2, "cp_exchange": "p2p"}, "fp32", "selective"),
    "cp2 a2a": (2, {"cp": 2, "cp_exchange": "a2a"}, "fp32", "none"),
    "pp2": (2, {"pp": 2}, "fp32", "none"),
    "pp2, all recomputed": (2, {"pp": 2}, "fp32", "full"),
    "pp2 interleaved": (2, {"pp": 2, "virtual_pp": 2}, "fp32", "none"),
    "dp2 ZeRO-1": (2, {}, "bf16", "none"),
    "dp2": (2, {"distributed_optimizer": False}, "bf16", "full"),
}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    started = {size: RankPool(size) for size in (1, 2)}
    yield started
    for pool in started.values():
        pool.close()


@pytest.mark.parametrize("case", CASES)
def test_predicted_is_measured(case: str, pools: dict[int, RankPool]) -> None:
    size, fields, precision, recompute = CASES[case]
    layout = Layout(**fields)
    job = Job(
        TINY,
        layout,
        size,
        LENGTH,
        SEQUENCES,
        precision=precision,
        recompute=recompute,
        loss_chunk_tokens=32,
        mixed=False,
    )
    ranks: list[Measured] = pools[size].run(measure, TINY, layout, precision, recompute, LENGTH, SEQUENCES)
    for found in ranks:
        predicted = rank_memory(job, found.pp_rank, CPU_KERNELS)
        assert predicted.parameters == found.parameters
        assert predicted.gradients == found.gradients
        assert (
            predicted.optimizer - _padding_bytes(job, found.pp_rank) <= found.optimizer <= predicted.optimizer
        )
        sent = sum(vars(step_volume(job, found.pp_rank)).values())
        assert sent == pytest.approx(sum(found.sent.values()), rel=1e-3, abs=64)
        assert predicted.activations == pytest.approx(found.activations, rel=0.01)
    if layout.model_ranks == layout.cp:  # all ranks together hold the state of every weight exactly once
        copies = 1 if layout.distributed_optimizer else size
        per_weight = 8 if precision == "fp32" else 12
        assert sum(found.optimizer for found in ranks) == per_weight * sum(stage_weights(job, 0)) * copies


def _padding_bytes(job: Job, pp_rank: int) -> int:
    """Most bytes of optimizer state that the padding of a buffer would have."""
    if not job.layout.distributed_optimizer:
        return 0
    starts = 64 * len(stage_weights(job, pp_rank))
    return 12 * (starts + math.lcm(job.dp * job.layout.cp, 128))

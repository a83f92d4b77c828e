"""One update: the micro-batches of a global batch in, new weights and the numbers worth logging out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_prolong.mcore.build import StageModel
from megatron_prolong.mcore.groups import ParallelGroups
from megatron_prolong.mcore.micro_batch import MicroBatch
from megatron_prolong.mcore.optimizer import MegatronOptimizer, set_hyperparameters, update
from megatron_prolong.mcore.schedule import forward_backward
from megatron_prolong.recipe.schema import OptimizerSpec


@dataclass(frozen=True)
class StepMetrics:
    """What one step did, the same on every rank.

    Attributes:
        loss: mean over the targets of the global batch, in nats.
        grad_norm: global gradient norm before clipping; NaN when there was no finite loss.
        num_targets: tokens of the global batch that carried loss.
        updated: False when a step without targets, or with a non-finite loss or gradient, left weights and moments
            alone.
        wanted: False where the recipe passes the step over (`skip_steps`).
        told: sums over all ranks of what each had to tell; nothing where the step was passed over.
    """

    loss: float
    grad_norm: float
    lr: float
    num_targets: int
    updated: bool
    wanted: bool = True
    told: Sequence[float] = ()


def train_step(
    model: StageModel,
    optimizer: MegatronOptimizer,
    batches: Sequence[MicroBatch],
    groups: ParallelGroups,
    *,
    spec: OptimizerSpec,
    lr: float,
    computed: Callable[[], None] = lambda: None,
    tell: Callable[[], Sequence[float]] = tuple,
) -> StepMetrics:
    """Accumulate the gradient of the global batch's mean loss and make one AdamW update. Collective.

    Args:
        computed, tell: see `forward_backward`.
    """
    model.zero_gradients()
    optimizer.zero_grad()
    set_hyperparameters(optimizer, spec, lr)
    loss, num_targets, told = forward_backward(model, batches, groups, computed, tell)
    if not math.isfinite(loss):
        return StepMetrics(loss, math.nan, lr, num_targets, updated=False, told=told)
    updated, grad_norm = update(optimizer, spec.clip)
    return StepMetrics(loss, grad_norm, lr, num_targets, updated, told=told)

"""Learning rate of every step: linear warmup, then cosine, linear or constant."""

from __future__ import annotations

import math

from megatron_prolong.recipe.schema import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """Learning rate of the update made at step `step` (0-based) of a stage.

    The rate rises linearly over the first ceil(warmup · steps) updates, reaching `lr` on the last of them, and
    then decays to `min_lr_ratio · lr` on the last update of the stage: r + (1 − r)·cos, the shape of ProLong's
    and Megatron's schedules (which spend their first update at rate 0; this one does not).
    """
    done = step + 1
    warmup_steps = stage.warmup_steps
    if done <= warmup_steps:
        return stage.lr * done / warmup_steps
    if stage.schedule == "constant":
        return stage.lr
    progress = (done - warmup_steps) / (stage.num_steps - warmup_steps)
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if stage.schedule == "cosine" else 1 - progress
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * remaining)

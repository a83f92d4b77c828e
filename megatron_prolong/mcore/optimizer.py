"""AdamW over this rank's chunks: Megatron's distributed (ZeRO-1), mixed-precision or fp32 optimizer."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_prolong.mcore.build import StageModel
from megatron_prolong.recipe.schema import Layout, OptimizerSpec


def build_optimizer(
    model: StageModel, spec: OptimizerSpec, layout: Layout, *, lr: float
) -> MegatronOptimizer:
    """Build Megatron's optimizer for the recipe's AdamW.

    Megatron gives the norms (all one-dimensional weights; Llama has no biases) a group of their own, with `wd_mult`
    0; a checkpoint's groups are found by such multipliers, so these stay whether norms are decayed or not.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_eps=spec.eps,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=False)
    weights: list[Any] = [weight for chunk in model.chunks for weight in chunk.parameters()]
    for weight in filter(is_float8tensor, weights):
        weight.clear_high_precision_init_val()  # Megatron lets go of those of this rank's shard only
    return optimizer


def set_hyperparameters(optimizer: MegatronOptimizer, spec: OptimizerSpec, lr: float) -> None:
    """Set what the recipe says for the next update, whatever a loaded checkpoint had.

    Megatron leaves applying `wd_mult` to its own scheduler (OptimizerParamScheduler.step), which is not used here.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = spec.weight_decay * (1.0 if spec.decay_norms else group["wd_mult"])
        group["betas"] = (spec.beta1, spec.beta2)
        group["eps"] = spec.eps


def update(optimizer: MegatronOptimizer, clip: float) -> tuple[bool, float]:
    """Clip and apply one update; a non-finite gradient norm leaves weights and moments untouched.

    Returns:
        Whether the update was applied, and the global gradient norm before clipping.
    """
    optimizer.prepare_grads()  # looks for infinities only where losses are scaled, for fp16
    grad_norm = float(optimizer.clip_grad_norm(clip)) if clip > 0 else float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return False, grad_norm
    return bool(optimizer.step_with_ready_grads()), grad_norm

"""AdamW for CPU with the interface of Apex's and Transformer Engine's FusedAdam.

The update itself is torch's fused CPU kernel. The one difference from torch.optim.AdamW is where the step count
lives: in the parameter group, as Megatron's distributed optimizer expects of its Adam
(`DistributedOptimizer._filter_and_reorder_param_groups`, `load_state_dict`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamCPU(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov & Hutter) on fp32 CPU parameters.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        adam_w_mode: must stay True; the coupled variant is not offered.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay is implemented"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            if not params:
                continue
            # The fused kernel takes the count of the update being made, one tensor per parameter.
            step = torch.tensor(float(group["step"]))
            torch._fused_adamw_(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

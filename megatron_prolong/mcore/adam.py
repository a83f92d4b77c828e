"""AdamW of torch's fused kernels with the interface of Apex's and Transformer Engine's FusedAdam.

Used on CPU, and on a GPU where neither of the two is installed. The one difference from
torch.optim.AdamW is where the step count lives: in the parameter group, as in Apex and Transformer Engine.
Megatron's distributed optimizer can reshard the moments of such an optimizer; with torch's own its state_dict
fails before the first step and its load with KeyError 'step'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_prolong.runtime.replace import replaced


class FusedAdam(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam (Loshchilov & Hutter) on fp32 parameters.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        adam_w_mode: must stay True; the coupled variant is not offered.
        capturable: must stay False (Megatron-Core 0.17 and later name it); nothing is captured in CUDA graphs.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable, (
            "only decoupled weight decay, outside CUDA graphs, is implemented"
        )
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
            step = torch.tensor(float(group["step"]), device=params[0].device)
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


@contextlib.contextmanager
def fused_adam_in_megatron() -> Iterator[None]:
    """Make Megatron use `FusedAdam` inside this context, unless it has Transformer Engine's or Apex's and a GPU."""
    if distrib_optimizer.HAVE_APEX_OR_TE and torch.cuda.is_available():
        yield
        return
    replacements: list[tuple[Any, str, Any]] = [
        (megatron_optimizer, "Adam", FusedAdam),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", FusedAdam),
        # Its state_dict then reads the step from the group, where ours is.
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    ]
    with replaced(replacements):
        yield

"""What adaptive optimizers divide a gradient by, read from their state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# State -> exponential average of squares (with a bias to correct), or their sum.
AVERAGE, SUM = "exp_avg_sq", "sum"

HAVE_SECOND_MOMENTS = ("lamb", "adam", "adamw", "adagrad")
"""Dense optimizers with a number per weight to divide by; factored has one per row and column."""


class Preconditioner:
    """Gives 1 / (sqrt(v) + eps) of each parameter, with the second moment v of the steps so far.

    As v does not yet know the present step, it does not change what the step's samples say of their noise.

    Args:
        optimizer: of the dense part.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def is_ready(self) -> bool:
        """Whether every parameter has a second moment: after the first step of an adaptive optimizer."""
        states = [self._optimizer.state.get(p, {}) for group in self._optimizer.param_groups for p in group["params"]]
        # torch's Adagrad has its sums, of nothing, before the first step.
        return all((AVERAGE in state or SUM in state) and float(state["step"]) > 0 for state in states)

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> Tensor:
        """Return what a parameter's gradients are multiplied with, of its shape."""
        group = next(g for g in self._optimizer.param_groups if any(p is parameter for p in g["params"]))
        state = self._optimizer.state[parameter]
        eps = float(group.get("eps", 0.0))
        if SUM in state:
            second_moment: Tensor = state[SUM]
        else:
            is_corrected = group.get("bias_correction", True)
            second_moment = state[AVERAGE] / (1.0 - group["betas"][1] ** float(state["step"]) if is_corrected else 1.0)
        return (second_moment.sqrt() + eps).reciprocal()

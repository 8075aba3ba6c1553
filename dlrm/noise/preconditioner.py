"""What adaptive optimizers divide a gradient by, read from their state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# State -> exponential average of squares (with a bias to correct), or their sum.
AVERAGE, SUM = "exp_avg_sq", "sum"

HAVE_SECOND_MOMENTS = ("lamb", "adam", "adamw", "adagrad")
"""Dense optimizers with a number per weight to divide by; factored has one per row and column."""


LEAST_SHARE = 0.01
"""Of the mean of a tensor's second moments, below which none counts. In a run's first steps, a weight that hardly any
sample moves has a second moment of next to 0, which says that such samples are still to come: the first of them would
be all of the noise. So no gradient counts more than 10 times as much as that of a weight with the mean."""


class Preconditioner:
    """Gives 1 / (sqrt(v) + eps) of each parameter, with the second moment v of the steps so far, `LEAST_SHARE` or more.

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
        second_moment = second_moment.clamp(min=LEAST_SHARE * second_moment.mean())
        return (second_moment.sqrt() + eps).reciprocal()

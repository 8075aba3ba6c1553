"""Adam's second moment as one number per row and one per column of a matrix, and its first moment in 16 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlrm.optim.closure import ClosureOptimizer

LARGEST_BETA2 = 0.999
EPS = 1e-30


class Factored(ClosureOptimizer):
    """Adafactor as Zhai et al. modified it (2022, "Scaling Vision Transformers", arXiv:2106.04560, section 3.4).

    Of a matrix w [n, m] with the gradient g, at its own step t = 1, 2, ... (Shazeer and Stern 2018, arXiv:1804.04235,
    for the factors and the clipping):

        b2 = min(0.999, 1 - t^-0.8)
        r <- b2 r + (1 - b2) mean over columns of g^2 + 1e-30 ;  c <- the same over rows
        u  = g / sqrt(r c / mean(r)) ;  u <- u / max(1, rms(u) / clip)
        m <- momentum * m + (1 - momentum) * u
        w <- w - lr * (m + weight_decay * w)

    Tensors of more dimensions are matrices in their last two. Where the smaller of these is below ``min_dim``, and for
    vectors, the second moment is held whole. The step is not scaled by the weight's norm, so rates are Adam's. State
    per parameter: ``step`` (float32 scalar on the CPU), ``exp_avg`` (as w, in ``moment_dtype``), and ``row`` and
    ``column`` or ``exp_avg_sq``. Nothing is read back from the device.

    Args:
        params: Parameters, named parameters, or groups of them; all options may differ per group.
        lr: Learning rate.
        momentum: Decay per step of the running mean of u.
        weight_decay: Decoupled decay.
        clip: Most that the root mean square of u may be.
        min_dim: Smallest number of rows and columns whose second moment is factored.
        moment_dtype: In which ``exp_avg`` is stored; all arithmetic is the parameter's.

    Raises:
        ValueError: For options out of range, and in ``step`` for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        clip: float = 1.0,
        min_dim: int = 32,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "clip": clip,
            "min_dim": min_dim,
        }
        self.moment_dtype = moment_dtype
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "moment_dtype": self.moment_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for values in self.state.values():  # loading gives all of it the parameter's type
            values["exp_avg"] = values["exp_avg"].to(self.moment_dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters after checking its options."""
        options = {**self.defaults, **param_group}
        for name in ("lr", "weight_decay"):
            if not 0.0 <= options[name] < math.inf:
                raise ValueError(f"Factored: expected {name} >= 0 and finite, got {options[name]}")
        if not 0.0 <= options["momentum"] < 1.0:
            raise ValueError(f"Factored: expected momentum in [0, 1), got {options['momentum']}")
        if not options["clip"] > 0.0:
            raise ValueError(f"Factored: expected clip > 0, got {options['clip']}")
        super().add_param_group(param_group)

    def _move_all(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(group, param, param.grad)

    def _move(self, group: dict[str, Any], param: Tensor, gradient: Tensor) -> None:
        if gradient.is_sparse:
            raise ValueError("Factored: expected dense gradients, got a sparse one (tables have their own optimizer)")
        state = self.state[param] or self._make_state(param, group["min_dim"])
        state["step"] += 1.0
        keep = min(LARGEST_BETA2, 1.0 - state["step"].item() ** -0.8)
        update = gradient * _second_moment(state, gradient.square().add_(EPS), 1.0 - keep).rsqrt_()
        update.div_((update.square().mean().sqrt() / group["clip"]).clamp_(min=1.0))
        mean = state["exp_avg"].to(param.dtype).lerp_(update, 1.0 - group["momentum"])
        state["exp_avg"].copy_(mean)
        param.mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(mean, alpha=group["lr"])

    def _make_state(self, param: Tensor, min_dim: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(param, dtype=self.moment_dtype, memory_format=torch.preserve_format)
        if param.ndim > 1 and min(param.shape[-2:]) >= min_dim:
            state["row"] = param.new_zeros((*param.shape[:-1], 1))
            state["column"] = param.new_zeros((*param.shape[:-2], 1, param.shape[-1]))
        else:
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _second_moment(state: dict[str, Tensor], squares: Tensor, rest: float) -> Tensor:
    """Let the second moment follow, and return the estimate of it, as a new tensor."""
    if "row" not in state:
        return state["exp_avg_sq"].lerp_(squares, rest).clone()
    row, column = state["row"], state["column"]
    row.lerp_(squares.mean(dim=-1, keepdim=True), rest)
    column.lerp_(squares.mean(dim=-2, keepdim=True), rest)
    return (row / row.mean(dim=-2, keepdim=True)) * column

"""LAMB: the dense optimizer whose step is relative to each layer's norm, so one rate serves every layer and batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Lamb(Optimizer):
    """Layer-wise Adaptive Moments for Batch training (You et al. 2020, "Training BERT in 76 minutes", algorithm 2).

    Per parameter tensor w ("layer") with the gradient g, at its own step t = 1, 2, ...:

        m <- b1 m + (1 - b1) g ;  v <- b2 v + (1 - b2) g^2
        u  = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w
        q  = ||w|| / ||u||   (1 where either norm is 0)
        w <- w - lr * q * u

    so that a step's length is lr * ||w||. Bias correction acts on the direction and never on ``lr``: q would cancel the
    one but not the other. Norms are of the whole tensor before the update. Nothing is read back from
    the device. State per parameter: ``step`` (float32 scalar on the CPU), ``exp_avg`` and ``exp_avg_sq`` (as w).

    Args:
        params: Parameters, named parameters, or groups of them; all options but ``max_grad_norm`` may differ per group.
        lr: Length of a step relative to the layer's norm.
        betas: Decay per step of the running means of the gradient and of its square.
        eps: Added to the square root of the second moment.
        weight_decay: Multiple of w inside the direction.
        bias_correction: Divide the moments by 1 - beta^t.
        exclude_1d: Biases and norm scales (at most one dimension) get no weight decay and q = 1.
        always_adapt: With False, tensors without weight decay keep q = 1 (NVIDIA's variant).
        trust_clip: Bound q by 1 ("LAMBC").
        max_grad_norm: Before everything else, scale all gradients so that their global norm is at most this (NVIDIA's
            variant); None leaves them.

    Raises:
        ValueError: For options out of range, and in ``step`` for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        exclude_1d: bool = True,
        always_adapt: bool = True,
        trust_clip: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not 0.0 < max_grad_norm < math.inf:
            raise ValueError(f"Lamb: expected max_grad_norm > 0 or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "exclude_1d": exclude_1d,
            "always_adapt": always_adapt,
            "trust_clip": trust_clip,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters after checking its options."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; ``closure`` evaluates the loss anew and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        divisor = self._gradient_divisor()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params, divisor)
        return loss

    def _gradient_divisor(self) -> Tensor | None:
        """Return max(1, global gradient norm / max_grad_norm) as a float64 scalar, or None where it is switched off."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise ValueError("Lamb: expected dense gradients, got a sparse one (tables have their own row optimizer)")
        if self.max_grad_norm is None or not grads:
            return None
        global_norm: Tensor = torch.linalg.vector_norm(layer_norms(grads))
        return (global_norm / self.max_grad_norm).clamp_(min=1.0)

    def _update(self, group: dict[str, Any], params: list[Tensor], divisor: Tensor | None) -> None:
        """Take one step for ``params`` (those of ``group`` that have gradients)."""
        grads = [param.grad for param in params if param.grad is not None]
        if divisor is not None:
            grads = [grad / divisor.to(grad) for grad in grads]
        directions = self._directions(group, params, grads)
        layers = [i for i, param in enumerate(params) if param.ndim > 1 or not group["exclude_1d"]]
        weights, updates = [params[i] for i in layers], [directions[i] for i in layers]
        if layers and group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if layers and (group["weight_decay"] or group["always_adapt"]):
            ratios = trust_ratios(weights, updates, clip=group["trust_clip"])
            # Tensors rather than numbers, so that the host never waits for the device.
            torch._foreach_mul_(updates, [q.to(u) for q, u in zip(ratios.unbind(), updates, strict=True)])
        torch._foreach_add_(params, directions, alpha=-group["lr"])

    def _directions(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Advance the moments and return Adam's direction for each parameter, as new tensors."""
        states = [self._state_of(param) for param in params]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        steps = [s["step"] for s in states]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1.0)
        torch._foreach_lerp_(means, grads, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - beta2)
        denominators = torch._foreach_sqrt(squares)
        if group["bias_correction"]:
            # (m/c1) / (sqrt(v/c2) + eps) = m / (sqrt(v) * c1/sqrt(c2) + eps*c1): one pass over the tensors fewer.
            counts = [step.item() for step in steps]
            factors = [(1.0 - beta1**t) / math.sqrt(1.0 - beta2**t) for t in counts]
            torch._foreach_mul_(denominators, factors)
            torch._foreach_add_(denominators, [group["eps"] * (1.0 - beta1**t) for t in counts])
        else:
            torch._foreach_add_(denominators, group["eps"])
        return list(torch._foreach_div(means, denominators))

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """Return the parameter's state, made at its first gradient."""
        state: dict[str, Tensor] = self.state[param]
        if not state:
            # On the CPU, where reading it for the bias correction costs no synchronisation.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def layer_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, as float64 [len(tensors)] on the first one's device.

    As a square and a sum, because ``torch.sum`` adds in a tree: ``vector_norm`` adds in a row on a CPU and is wrong by
    up to 1 % for 16 million float32 entries. A float64 copy of every tensor would cost more than the rest of the step.
    """
    wide = [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
    sums = [tensor.square().sum() for tensor in wide]
    return torch.stack([total.to(sums[0].device, torch.float64) for total in sums]).sqrt_()


def trust_ratios(weights: Sequence[Tensor], updates: Sequence[Tensor], *, clip: bool = False) -> Tensor:
    """Return ||w|| / ||u|| per layer as float64 [len(weights)]; 1 where a norm is 0, and at most 1 with ``clip``."""
    weight_norms, update_norms = layer_norms([*weights, *updates]).chunk(2)
    defined = (weight_norms > 0) & (update_norms > 0)
    ratios = torch.where(defined, weight_norms / update_norms, 1.0)
    return ratios.clamp_(max=1.0) if clip else ratios


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for options whose numbers are out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= options[name] < math.inf:
            raise ValueError(f"Lamb: expected {name} >= 0 and finite, got {options[name]}")
    if len(options["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in options["betas"]):
        raise ValueError(f"Lamb: expected two betas in [0, 1), got {options['betas']}")

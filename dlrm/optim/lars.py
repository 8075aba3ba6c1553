"""LARS: SGD with momentum whose step is relative to each layer's norm, in both forms that were published."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from dlrm.optim.closure import ClosureOptimizer
from dlrm.optim.trust_ratios import layer_norms

LarsVariant = Literal["original", "paper_lamb"]


class Lars(ClosureOptimizer):
    """Layer-wise Adaptive Rate Scaling.

    Per parameter tensor w ("layer") with the gradient g, as ``original`` (You et al. 2017, "Large Batch Training of
    Convolutional Networks", arXiv:1708.03888, algorithm 1), with the momentum outside the ratio:

        q = trust_coefficient * ||w|| / (||g|| + weight_decay * ||w|| + eps)   (1 where ||w|| is 0)
        m <- momentum * m + lr * q * (g + weight_decay * w) ;  w <- w - m

    and as ``paper_lamb`` (You et al. 2020, arXiv:1904.00962, algorithm 1), with the momentum's own length divided out:

        m <- momentum * m + (1 - momentum) * (g + weight_decay * w)
        w <- w - lr * (||w|| / ||m||) * m   (1 for the ratio where either norm is 0)

    so that a step's length is lr * ||w||. The one's learning rates are as large as SGD's, the other's are LAMB's.
    Biases and norm scales (at most one dimension) get no weight decay and a ratio of 1. State per parameter:
    ``momentum_buffer`` (as w). Nothing is read back from the device.

    Args:
        params: Parameters, named parameters, or groups of them; all options may differ per group.
        lr: Learning rate.
        momentum: Share of the last step, or of the running mean, that is kept.
        weight_decay: Multiple of w in the gradient.
        trust_coefficient: Of ``original``: length of a step relative to the layer's norm, times ``lr``.
        eps: Of ``original``: added to the norm of the gradient.
        variant: Which of the two.

    Raises:
        ValueError: For options out of range, and in ``step`` for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        variant: LarsVariant = "original",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "variant": variant,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters after checking its options."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _move_all(self) -> None:
        for group in self.param_groups:
            held = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in held):
                raise ValueError("Lars: expected dense gradients, got a sparse one (tables have their own optimizer)")
            matrices, vectors = [p for p in held if p.ndim > 1], [p for p in held if p.ndim <= 1]
            move = self._move if group["variant"] == "original" else self._move_normalised
            if matrices:
                move(group, matrices, adapts=True)
            if vectors:
                move({**group, "weight_decay": 0.0}, vectors, adapts=False)

    def _move(self, group: dict[str, Any], weights: list[Tensor], *, adapts: bool) -> None:
        decay, momenta = group["weight_decay"], self._momenta(weights)
        directions = [param.grad.clone() for param in weights if param.grad is not None]
        if adapts:
            weight_norms, gradient_norms = layer_norms([*weights, *directions]).chunk(2)
            below = gradient_norms + decay * weight_norms + group["eps"]
            defined = (weight_norms > 0) & (below > 0)
            ratios = torch.where(defined, group["trust_coefficient"] * weight_norms / below, 1.0)
            torch._foreach_add_(directions, weights, alpha=decay)
            torch._foreach_mul_(directions, _split(ratios, directions))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, directions, alpha=group["lr"])
        torch._foreach_sub_(weights, momenta)

    def _move_normalised(self, group: dict[str, Any], weights: list[Tensor], *, adapts: bool) -> None:
        momenta = self._momenta(weights)
        gradients = [param.grad for param in weights if param.grad is not None]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        steps = momenta
        if adapts:
            weight_norms, momentum_norms = layer_norms([*weights, *momenta]).chunk(2)
            defined = (weight_norms > 0) & (momentum_norms > 0)
            ratios = torch.where(defined, weight_norms / momentum_norms, 1.0)
            steps = list(torch._foreach_mul(momenta, _split(ratios, momenta)))
        torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def _momenta(self, weights: list[Tensor]) -> list[Tensor]:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return [self.state[weight]["momentum_buffer"] for weight in weights]


def _split(ratios: Tensor, like: list[Tensor]) -> list[Tensor]:
    # Tensors rather than numbers, so that the host never waits for the device.
    return [ratio.to(tensor) for ratio, tensor in zip(ratios.unbind(), like, strict=True)]


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps", "trust_coefficient"):
        if not 0.0 <= options[name] < math.inf:
            raise ValueError(f"Lars: expected {name} >= 0 and finite, got {options[name]}")
    if not 0.0 <= options["momentum"] < 1.0:
        raise ValueError(f"Lars: expected momentum in [0, 1), got {options['momentum']}")
    if options["variant"] not in ("original", "paper_lamb"):
        raise ValueError(f"Lars: expected variant 'original' or 'paper_lamb', got {options['variant']!r}")

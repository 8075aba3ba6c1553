"""LAMB's moves of weights of any type and place, with torch's multi-tensor operations; see `Lamb` for the formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlrm.optim.trust_ratios import squared_norms, trust_ratios


class Layer(NamedTuple):
    """A parameter that takes a step.

    Attributes:
        group: of the optimizer, whose options it has.
        weight: the parameter.
        gradient: its own.
        mean: first moment.
        square: second moment.
        step: count of its steps, a float32 scalar on the CPU.
        decay: its weight decay.
        adapts: whether its step is relative to its norm.
    """

    group: dict[str, Any]
    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    decay: float
    adapts: bool


class OperationMoves:
    """Advances the moments of layers, and then moves their weights.

    Args:
        layers: those of a group in a row.
        divisor: of all gradients, a scalar; None leaves them.

    Attributes:
        squares: ||w||^2 and ||u||^2, [layers, 2] in float64; zeros for layers that do not adapt.
    """

    def __init__(self, layers: Sequence[Layer], divisor: Tensor | None) -> None:
        self._groups = group_layers(layers)
        self._directions = [_find_directions(group, members, divisor) for group, members in self._groups]
        directions = [direction for of_group in self._directions for direction in of_group]
        self.squares = _square(layers, directions)

    def find_ratios(self, squares: Tensor) -> Tensor:
        """Return the layers' ratios, [layers] in float64."""
        options = [(group["norm_bounds"], group["trust_clip"]) for group, _ in self._groups]
        parts = squares.split([len(members) for _, members in self._groups])
        return torch.cat([trust_ratios(part, bounds=b, clip=c) for part, (b, c) in zip(parts, options, strict=True)])

    def finish(self, ratios: Tensor) -> None:
        """Move every weight by its direction times its ratio and its group's rate; ratios are [layers]."""
        rows = ratios.unbind()
        start = 0
        for (group, members), directions in zip(self._groups, self._directions, strict=True):
            own = rows[start : start + len(members)]
            start += len(members)
            adapting = [i for i, layer in enumerate(members) if layer.adapts]
            if adapting:
                # Tensors rather than numbers, so that the host never waits for the device.
                factors = [own[i].to(directions[i]) for i in adapting]
                torch._foreach_mul_([directions[i] for i in adapting], factors)
            torch._foreach_add_([layer.weight for layer in members], directions, alpha=-group["lr"])


def group_layers(layers: Sequence[Layer]) -> list[tuple[dict[str, Any], list[Layer]]]:
    """Return each group with its layers, which stand in a row."""
    groups: dict[int, tuple[dict[str, Any], list[Layer]]] = {}
    for layer in layers:
        groups.setdefault(id(layer.group), (layer.group, []))[1].append(layer)
    return list(groups.values())


def _find_directions(group: dict[str, Any], layers: Sequence[Layer], divisor: Tensor | None) -> list[Tensor]:
    """Advance the moments of one group and return its directions, as new tensors."""
    gradients, squares = [layer.gradient for layer in layers], [layer.square for layer in layers]
    if divisor is not None:
        gradients = [gradient / divisor.to(gradient) for gradient in gradients]
    stored = [layer.mean for layer in layers]
    means = [mean.to(layer.weight.dtype) for mean, layer in zip(stored, layers, strict=True)]
    steps = [layer.step for layer in layers]
    beta1, beta2 = group["betas"]
    torch._foreach_add_(steps, 1.0)
    torch._foreach_lerp_(means, gradients, 1.0 - beta1)
    if any(mean is not narrow for mean, narrow in zip(means, stored, strict=True)):
        torch._foreach_copy_(stored, means)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
    denominators = torch._foreach_sqrt(squares)
    if group["bias_correction"]:
        # (m/c1) / (sqrt(v/c2) + eps) = m / (sqrt(v) * c1/sqrt(c2) + eps*c1): one pass over the tensors fewer.
        counts = [step.item() for step in steps]
        factors = [(1.0 - beta1**t) / math.sqrt(1.0 - beta2**t) for t in counts]
        torch._foreach_mul_(denominators, factors)
        torch._foreach_add_(denominators, [group["eps"] * (1.0 - beta1**t) for t in counts])
    else:
        torch._foreach_add_(denominators, group["eps"])
    directions = list(torch._foreach_div(means, denominators))
    decaying = [i for i, layer in enumerate(layers) if layer.decay]
    if decaying:
        weights = [layers[i].weight for i in decaying]
        torch._foreach_add_([directions[i] for i in decaying], weights, alpha=group["weight_decay"])
    return directions


def _square(layers: Sequence[Layer], directions: Sequence[Tensor]) -> Tensor:
    adapting = [i for i, layer in enumerate(layers) if layer.adapts]
    device = layers[0].weight.device
    if not adapting:
        return torch.zeros(len(layers), 2, dtype=torch.float64, device=device)
    measured = squared_norms([*(layers[i].weight for i in adapting), *(directions[i] for i in adapting)])
    pairs = dict(zip(adapting, measured.view(2, -1).T, strict=True))
    nothing = measured.new_zeros(2)
    return torch.stack([pairs.get(i, nothing) for i in range(len(layers))])

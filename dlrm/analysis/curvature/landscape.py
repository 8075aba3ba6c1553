"""Walks through the space of weights: along random directions, and along the line between two solutions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def draw_direction(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw a random direction of which every filter is as long as the weights' own.

    A filter is the row of a matrix: of a linear layer what one output reads, of a table one row. Tensors of at most one
    dimension (biases, scales) stay where they are. Without this, a direction's effect says more of the scale of the
    weights than of the loss (Li et al. 2018, arXiv:1712.09913, section 4).

    Args:
        weights: by name.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw_like(tensor, generator) for name, tensor in weights.items()}


def _draw_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    if weight.ndim <= 1:
        return torch.zeros_like(weight)
    drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
    of_filter = tuple(range(1, weight.ndim))
    scale: Tensor = weight.norm(dim=of_filter, keepdim=True) / drawn.norm(dim=of_filter, keepdim=True)
    return drawn * scale


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return `(1 - share) * first + share * second`, tensor by tensor; counters, which are whole numbers, are first's.

    Running means and variances of normalisations are among the tensors: a network half way with the statistics of one
    end would not be half way. Beyond the ends a variance may not fall below zero.

    Args:
        first: weights and buffers by name.
        second: of the same names and shapes.
        share: 0 is the first, 1 the second; others lie between or beyond.

    Raises:
        ValueError: the two are of other names or shapes.
    """
    if {name: tensor.shape for name, tensor in first.items()} != {n: tensor.shape for n, tensor in second.items()}:
        raise ValueError("interpolation: expected two solutions of the same architecture, got different tensors")
    mixed = {
        name: torch.lerp(tensor, second[name].to(tensor), share) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
    return {name: tensor.clamp(min=0) if name.endswith("running_var") else tensor for name, tensor in mixed.items()}

"""What the replicated dense part of a DLRM costs per sample, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dlrm.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DenseCost:
    """The work and the size of a dense part.

    Attributes:
        flops: of the forward pass, per sample: two for each multiplication; the backward pass does twice as much.
        numbers: that the forward pass writes per sample: what each layer gives.
        parameters: weights and biases.
    """

    flops: int = 0
    numbers: int = 0
    parameters: int = 0

    def __add__(self, other: DenseCost) -> DenseCost:
        """Return the cost of both."""
        return DenseCost(
            flops=self.flops + other.flops,
            numbers=self.numbers + other.numbers,
            parameters=self.parameters + other.parameters,
        )


def dense_cost(model: ModelConfig, num_numeric: int, dims: Sequence[int]) -> DenseCost:
    """Return the cost of a model's dense part.

    Args:
        model: the model.
        num_numeric: number of numeric columns.
        dims: of each feature's vector.
    """
    dim, vectors = model.dim, len(dims) + 1
    bottom = (
        _mlp([num_numeric, *model.bottom, dim])
        if num_numeric
        else DenseCost(numbers=dim, parameters=dim)  # a learned vector
    )
    if model.interaction == "dcn":
        width = dim + sum(dims)
        weights = 2 * width * model.cross_rank
        layer = DenseCost(flops=2 * weights + 3 * width, numbers=3 * width, parameters=weights + width)
        interaction = DenseCost()
        for _ in range(model.cross_layers):
            interaction += layer
    elif model.interaction == "fm":
        width = 3 * dim
        interaction = DenseCost(flops=4 * vectors * dim, numbers=2 * vectors * dim + width)
    elif model.interaction == "projection":
        width = dim + vectors * model.projection
        interaction = DenseCost(
            flops=4 * vectors * model.projection * dim,
            numbers=width + (vectors + model.projection) * dim,
            parameters=model.projection * vectors,
        )
    else:
        pairs = vectors * (vectors - 1) // 2
        width = dim + pairs
        interaction = DenseCost(flops=2 * pairs * dim, numbers=width)
    return bottom + interaction + _mlp([width, *model.top, 1])


def _mlp(widths: Sequence[int]) -> DenseCost:
    cost = DenseCost()
    for fan_in, fan_out in pairwise(widths):
        cost += DenseCost(flops=2 * fan_in * fan_out, numbers=2 * fan_out, parameters=(fan_in + 1) * fan_out)
    return cost

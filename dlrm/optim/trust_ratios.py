"""Norms of layers and the ratio of two, relative to which Lamb and Lars take their steps; also of layers in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NormBounds = tuple[float, float]


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared Euclidean norm of each tensor, as float64 [len(tensors)] on the first one's device.

    As a square and a sum, because ``torch.sum`` adds in a tree: ``vector_norm`` adds in a row on a CPU and is wrong by
    up to 1 % for 16 million float32 entries. A float64 copy of every tensor would cost more than the rest of the step.
    """
    wide = [tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
    sums = [tensor.square().sum() for tensor in wide]
    return torch.stack([total.to(sums[0].device, torch.float64) for total in sums])


def layer_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of each tensor, see `squared_norms`."""
    return squared_norms(tensors).sqrt_()


def trust_ratios(squares: Tensor, *, bounds: NormBounds | None = None, clip: bool = False) -> Tensor:
    """Return phi(||w||) / ||u|| per layer; 1 where a norm is 0, as it is said to be of layers that are not adapted.

    Args:
        squares: ||w||^2 and ||u||^2, [layers, 2] in float64.
        bounds: phi keeps ||w|| between these; None leaves it.
        clip: Bound the ratio by 1.

    Returns:
        The ratios, [layers] in float64.
    """
    weights, updates = squares.unbind(1)
    defined = squares.amin(1) > 0
    if bounds is not None:
        weights = weights.clamp(bounds[0] ** 2, bounds[1] ** 2)
    ratios = torch.where(defined, (weights / updates).sqrt_(), 1.0)
    return ratios.clamp_(max=1.0) if clip else ratios


def sum_over_shards(squares: Tensor, sharded: Sequence[int], process_group: Any) -> Tensor:
    """Add up the squared norms of layers of which every rank holds a piece, all in one message (a collective call).

    Args:
        squares: Of layers, [layers, ...]: of this rank's piece, or of the whole.
        sharded: Places of layers in pieces; in the same order on all ranks, which may have other layers as well.
        process_group: Of the ranks that hold pieces; None are all.

    Returns:
        The squares of whole layers.
    """
    if not sharded:
        return squares
    places = torch.tensor(sharded, device=squares.device)
    packed = squares[places]
    dist.all_reduce(packed, group=process_group)
    return squares.index_copy(0, places, packed)

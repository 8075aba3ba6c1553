"""Two views of the same samples against each other: the Gram matrix that InfoNCE and the regularisers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Contrast(NamedTuple):
    """Products between all vectors of two views.

    Attributes:
        similarities: [2B, 2B]; the first B rows are the first view. The diagonal is -inf.
        positives: [2B] products of each vector with its other view.
        partners: [2B] int64, which column that is.
    """

    similarities: Tensor
    positives: Tensor
    partners: Tensor

    def negatives(self) -> Tensor:
        """[2B, 2B] products with other samples' vectors; -inf at the diagonal and at the positives."""
        return self.similarities.scatter(1, self.partners.unsqueeze(1), -torch.inf)


def contrast(first: Tensor, second: Tensor, temperature: float = 1.0) -> Contrast:
    """Multiply all vectors of two views, [B, dim] each, by all others.

    Raises:
        ValueError: If the views' shapes differ, or if they are empty.
    """
    check_views(first, second)
    size = len(first)
    vectors = torch.cat([first, second])
    similarities = vectors @ vectors.T / temperature
    positives = similarities.diagonal(size)  # symmetric: the second view's are the same numbers
    diagonal = torch.eye(2 * size, dtype=torch.bool, device=vectors.device)
    partners = torch.arange(2 * size, device=vectors.device).roll(-size)
    return Contrast(similarities.masked_fill(diagonal, -torch.inf), torch.cat([positives, positives]), partners)


def check_views(first: Tensor, second: Tensor) -> None:
    """Complain of views that cannot be contrasted.

    Raises:
        ValueError: If their shapes differ, or if they are empty.
    """
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(f"contrast: expected two views [B, dim], got {[*first.shape]} and {[*second.shape]}")
    if len(first) == 0:
        raise ValueError("contrast: expected at least one sample in a batch, got none")

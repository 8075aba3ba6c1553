"""The published formulas as naive loops in float64, which share nothing with the code that is held against them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor


def _two_views(first: Tensor, second: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """The positive product and the negative ones of each of the 2B vectors."""
    vectors, size = [*first, *second], len(first)
    found = []
    for i, vector in enumerate(vectors):
        other = (i + size) % (2 * size)
        negatives = [torch.dot(vector, vectors[j]) for j in range(2 * size) if j not in (i, other)]
        found.append((torch.dot(vector, vectors[other]), negatives))
    return found


def info_nce(first: Tensor, second: Tensor, temperature: float = 1.0) -> Tensor:
    terms = []
    for positive, negatives in _two_views(first, second):
        exponentials = [torch.exp(product / temperature) for product in (positive, *negatives)]
        terms.append(-torch.log(exponentials[0] / sum(exponentials)))
    return sum(terms) / len(terms)


def row_regulariser(first: Tensor, second: Tensor) -> Tensor:
    pulls, pushes = [], []
    for positive, negatives in _two_views(first, second):
        margin = max(negatives)
        pulls.append(torch.relu(positive - margin))
        pushes += [max(positive, margin) - negative for negative in negatives]
    return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


def batch_regulariser(first: Tensor, second: Tensor) -> Tensor:
    positives = [positive for positive, _ in _two_views(first, second)]
    negatives = [negative for _, them in _two_views(first, second) for negative in them]
    lower, upper = min(min(positives), max(negatives)), max(min(positives), max(negatives))
    pulls = [torch.relu(positive - lower) for positive in positives]
    pushes = [torch.relu(upper - negative) for negative in negatives]
    return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


def next_item(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    terms = []
    for vector, target in zip(hidden, targets.tolist(), strict=True):
        exponentials = [torch.exp(torch.dot(vector, row)) for row in rows]
        terms.append(-torch.log(exponentials[target] / sum(exponentials)))
    return sum(terms) / len(terms)


def augment(hidden: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Linear, GELU, Linear, GELU, Linear, length one; of (weight, bias) pairs."""
    out = []
    for vector in hidden:
        for number, (weight, bias) in enumerate(layers):
            if number:
                vector = vector * 0.5 * (1.0 + torch.erf(vector / 2.0**0.5))
            vector = torch.stack([torch.dot(row, vector) + offset for row, offset in zip(weight, bias, strict=True)])
        out.append(vector / torch.sqrt((vector**2).sum()))
    return torch.stack(out)


@pytest.fixture
def formulas() -> SimpleNamespace:
    """Each loss term, of float64 tensors, to be differentiated by autograd."""
    return SimpleNamespace(
        info_nce=info_nce,
        row_regulariser=row_regulariser,
        batch_regulariser=batch_regulariser,
        next_item=next_item,
        augment=augment,
    )

"""A small network whose whole Hessian is cheap, and a quadratic whose every number is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlrm.analysis.curvature.objective import Objective


class Quadratic(nn.Module):
    """0.5 * w^T diag(curvatures) w, or with a rotation w = rotation @ weights."""

    def __init__(self, curvatures: Tensor, weights: Tensor, rotation: Tensor | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.curvatures, self.rotation = curvatures, rotation

    def forward(self, part: Any) -> Tensor:
        turned = self.weights if self.rotation is None else self.rotation @ self.weights
        return 0.5 * (self.curvatures * turned.square()).sum()


class MlpLoss(nn.Module):
    """The mean cross-entropy of a small network; 57 weights, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, part: tuple[Tensor, Tensor]) -> Tensor:
        numbers, labels = part
        return nn.functional.binary_cross_entropy_with_logits(self.network(numbers) * self.scale[0], labels)


@pytest.fixture
def quadratic() -> Callable[..., Objective]:
    """Make the objective of a quadratic."""

    def make(curvatures: Tensor, weights: Tensor, rotation: Tensor | None = None) -> Objective:
        return Objective(Quadratic(curvatures, weights, rotation), [(None, 1)])

    return make


@pytest.fixture
def mlp() -> MlpLoss:
    return MlpLoss()


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    """Fifty points and their labels."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    return numbers, (numbers[:, 0] * numbers[:, 1] > 0).double()


@pytest.fixture
def mlp_parts(points: tuple[Tensor, Tensor]) -> list[tuple[tuple[Tensor, Tensor], int]]:
    """The points in parts of unequal size, one of them empty."""
    ends = [0, 13, 13, 45, 50]
    return [(tuple(column[a:b] for column in points), b - a) for a, b in pairwise(ends)]


@pytest.fixture
def exact_hessian(mlp: MlpLoss, points: tuple[Tensor, Tensor]) -> Callable[[list[str]], Tensor]:
    """Compute the whole Hessian over parameters of some names, by torch.func and without our code."""

    def compute(names: list[str]) -> Tensor:
        chosen = {name: parameter.detach() for name, parameter in mlp.named_parameters() if name in names}

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(mlp, weights, (points,))

        blocks = torch.func.jacrev(torch.func.jacrev(loss))(chosen)  # forward mode would warn of torch.jit
        return torch.cat(
            [
                torch.cat([blocks[a][b].reshape(chosen[a].numel(), chosen[b].numel()) for b in names], dim=1)
                for a in names
            ]
        )

    return compute

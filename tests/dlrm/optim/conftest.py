"""Steps on gradients that depend on the step alone, so that a run may be cut and taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.optim import Optimizer

Train = Callable[[Sequence[torch.nn.Parameter], Sequence[Optimizer], range], None]


@pytest.fixture
def train() -> Train:
    """Let optimizers take some steps with weights, each of which has no gradient in every fifth one."""

    def take_steps(weights: Sequence[torch.nn.Parameter], optimizers: Sequence[Optimizer], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for place, weight in enumerate(weights):
                gradient = torch.randn(weight.shape, generator=generator)
                weight.grad = None if (step + place) % 5 == 0 else gradient
            for optimizer in optimizers:
                optimizer.step()

    return take_steps

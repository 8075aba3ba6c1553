"""A first moment in 16 bits does not show in training curves, as was published (Zhai et al. 2022, arXiv:2106.04560)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dlrm.optim.lamb import Lamb

SEEDS, STEPS, BATCH, SAMPLES = 4, 50, 128, 1024


def train(seed: int, moment_dtype: torch.dtype | None) -> list[float]:
    """Fit three layers to a smooth function; return the loss over all samples after every tenth step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, 20, generator=generator)
    y = x[:, :4].sum(dim=1, keepdim=True).sin()
    weights = [
        nn.Parameter(torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5)
        for rows, columns in ((32, 20), (32, 32), (1, 32))
    ]
    optimizer = Lamb(weights, lr=0.02, weight_decay=0.0, moment_dtype=moment_dtype)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = (x @ weight.T).relu()
        return (x @ weights[-1].T - y).square().mean()

    curve = []
    for step in range(STEPS):
        batch = torch.randint(SAMPLES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(x[batch], y[batch]).backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                curve.append(float(loss(x, y)))
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {moment_dtype or torch.float32}
    return curve


def train_all(moment_dtype: torch.dtype | None) -> NDArray[np.float64]:
    """Give the curves, [seeds, points]."""
    return np.array([train(seed, moment_dtype) for seed in range(SEEDS)])


def test_curves_differ_by_less_than_those_of_seeds() -> None:
    """Those of a moment in eight bits, with three of them for the fraction, differ by more than 16 would be allowed."""
    wide, narrow = train_all(None), train_all(torch.bfloat16)
    assert (wide[:, -1] < 0.7 * wide[:, 0]).all()
    between_seeds = wide.std(axis=0, ddof=1)
    apart = np.abs(narrow - wide).max(axis=0)
    assert apart.max() > 0
    assert (apart < 0.3 * between_seeds).all()
    coarse = train_all(torch.float8_e4m3fn)
    assert (np.abs(coarse - wide).max(axis=0) > 0.5 * between_seeds).any()

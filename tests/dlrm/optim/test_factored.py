"""The factored optimizer against its formula in float64, against torch's where the two agree, and in what it stores."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.optim.factored import Factored

SHAPES = [(40, 33), (5, 40), (7,), (2, 35, 32)]
STEPS = 8


def problem(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=dtype) * 10.0**-i for i, shape in enumerate(SHAPES)]
        for _ in range(STEPS)
    ]
    return weights, gradients


def train(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, gradients: Any) -> None:
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()


def plain(w: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """The formula, line by line."""
    factors = w.ndim > 1 and min(w.shape[-2:]) >= 32
    row = column = whole = mean = 0.0
    for t, g in enumerate(gradients, start=1):
        beta2 = min(0.999, 1 - t**-0.8)
        square = g**2 + 1e-30
        if factors:
            row = beta2 * row + (1 - beta2) * square.mean(-1, keepdims=True)
            column = beta2 * column + (1 - beta2) * square.mean(-2, keepdims=True)
            u = g / np.sqrt(row * column / row.mean(-2, keepdims=True))
        else:
            whole = beta2 * whole + (1 - beta2) * square
            u = g / np.sqrt(whole)
        u = u / max(1.0, np.sqrt((u**2).mean()) / 0.9)
        mean = 0.8 * mean + 0.2 * u
        w = w - 0.05 * (mean + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_equals_the_formula_in_float64(decay: float) -> None:
    weights, gradients = problem(torch.float64)
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Factored(params, lr=0.05, momentum=0.8, weight_decay=decay, clip=0.9, moment_dtype=torch.float64)
    train(params, optimizer, gradients)
    for i, (param, weight) in enumerate(zip(params, weights, strict=True)):
        expected = plain(weight.numpy(), [step[i].numpy() for step in gradients], decay)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_without_momentum_and_scale_it_is_torchs() -> None:
    """Torch's rate is relative to the root mean square of the weights, here held at 1 by renewing them."""
    ours, theirs = (torch.nn.Parameter(torch.ones(40, 33)) for _ in range(2))
    optimizers = [
        Factored([ours], lr=0.01, momentum=0.0, moment_dtype=torch.float32),
        torch.optim.Adafactor([theirs], lr=0.01, eps=(1e-15, 1e-3)),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        gradient = torch.randn(40, 33, generator=generator)
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.data.fill_(1.0)
            param.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_matrix_has_two_bytes_per_weight_and_its_edges() -> None:
    param = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = Factored([param])
    train([param], optimizer, [[torch.ones(64, 128)]])
    state = optimizer.state[param]
    assert sum(t.numel() * t.itemsize for t in state.values()) == 2 * 64 * 128 + 4 * (64 + 128) + 4
    assert state["exp_avg"].dtype == torch.bfloat16


def test_resuming_is_bit_equal() -> None:
    weights, gradients = problem(torch.float32)
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Factored(params, lr=0.05)
    train(params, optimizer, gradients[:3])
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Factored(others, lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(resumed.state[other]["exp_avg"].dtype == torch.bfloat16 for other in others)
    train(params, optimizer, gradients[3:])
    train(others, resumed, gradients[3:])
    assert all(map(torch.equal, params, others))


def test_gradients_of_zeros_move_nothing() -> None:
    param = torch.nn.Parameter(torch.ones(40, 40))
    train([param], Factored([param]), [[torch.zeros(40, 40)]] * 3)
    assert torch.equal(param, torch.ones(40, 40))


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"clip": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Factored([torch.nn.Parameter(torch.ones(2))], **options)

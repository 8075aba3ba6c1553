"""Lars against optax, plain formulas in float64, and what the formulas promise."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.optim.lars import Lars

SHAPES = [(16, 13), (33, 16), (16,), (2, 3, 4)]
STEPS = 20


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    weights = [0.3 * torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator, dtype=dtype) * 10.0**-i for i, shape in enumerate(SHAPES)]
        for _ in range(STEPS)
    ]
    return weights, gradients


def train(dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    weights, gradients = problem(dtype)
    params = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = Lars(params, **options)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, step, strict=True))
    return [param.detach() for param in params]


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_the_original_equals_optax(eps: float) -> None:
    """Without decay: optax takes the norm of gradient and decay together, the paper the sum of their norms."""
    optax = pytest.importorskip("optax", reason="optax is not installed")
    weights, gradients = problem()
    is_matrix = [weight.ndim > 1 for weight in weights]
    transform = optax.lars(0.7, weight_decay=0.0, trust_coefficient=0.05, eps=eps, trust_ratio_mask=is_matrix)
    theirs = [w.numpy() for w in weights]
    state = transform.init(theirs)
    for step in gradients:
        updates, state = transform.update([g.numpy() for g in step], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    ours = train(lr=0.7, trust_coefficient=0.05, eps=eps)
    for left, right in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(left.numpy(), np.asarray(right), rtol=0, atol=1e-6)


def plain(variant: str, weights: list[np.ndarray], gradients: list[list[np.ndarray]], decay: float) -> list[np.ndarray]:
    """Three lines of either paper in float64, with one-dimensional tensors excluded."""
    momenta = [np.zeros_like(w) for w in weights]
    for step in gradients:
        for i, g in enumerate(step):
            w, is_matrix = weights[i], weights[i].ndim > 1
            length = np.sqrt((w**2).sum())
            d = decay if is_matrix else 0.0
            if variant == "original":
                q = 0.02 * length / (np.sqrt((g**2).sum()) + d * length) if is_matrix else 1.0
                momenta[i] = 0.8 * momenta[i] + 0.5 * q * (g + d * w)
                weights[i] = w - momenta[i]
            else:
                momenta[i] = 0.8 * momenta[i] + 0.2 * (g + d * w)
                q = length / np.sqrt((momenta[i] ** 2).sum()) if is_matrix else 1.0
                weights[i] = w - 0.5 * q * momenta[i]
    return weights


@pytest.mark.parametrize("variant", ["original", "paper_lamb"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_formula_in_float64(variant: str, decay: float) -> None:
    weights, gradients = problem(torch.float64)
    expected = plain(variant, [w.numpy() for w in weights], [[g.numpy() for g in s] for s in gradients], decay)
    ours = train(torch.float64, lr=0.5, momentum=0.8, weight_decay=decay, trust_coefficient=0.02, variant=variant)
    for left, right in zip(ours, expected, strict=True):
        np.testing.assert_allclose(left.numpy(), right, rtol=1e-10, atol=1e-12)


def first_step(weight: torch.Tensor, gradient: torch.Tensor, **options: Any) -> torch.Tensor:
    param = torch.nn.Parameter(weight.clone())
    param.grad = gradient
    Lars([param], **options).step()
    return param.detach() - weight


@pytest.mark.parametrize(("variant", "relative"), [("original", 0.5 * 0.001), ("paper_lamb", 0.5)])
def test_a_step_is_relative_to_the_weights_whatever_the_gradient(variant: str, relative: float) -> None:
    weight, gradient = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    change = first_step(weight, gradient, lr=0.5, variant=variant)
    assert float(change.norm() / weight.norm()) == pytest.approx(relative, rel=1e-12)
    larger = first_step(weight, 1000 * gradient, lr=0.5, variant=variant)
    torch.testing.assert_close(larger, change, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("variant", ["original", "paper_lamb"])
def test_zeros_stay_finite_and_zero_weights_move(variant: str) -> None:
    still = first_step(torch.ones(3, 3), torch.zeros(3, 3), variant=variant)
    assert torch.equal(still, torch.zeros(3, 3))
    moved = first_step(torch.zeros(3, 3), torch.ones(3, 3), lr=0.5, momentum=0.0, variant=variant)
    torch.testing.assert_close(moved, torch.full((3, 3), -0.5))


def test_a_layer_without_gradient_decays_at_the_coefficient() -> None:
    change = first_step(torch.ones(3, 3), torch.zeros(3, 3), lr=0.5, weight_decay=0.1, trust_coefficient=0.01)
    torch.testing.assert_close(change, torch.full((3, 3), -0.5 * 0.01))


def test_resuming_is_bit_equal() -> None:
    weights, gradients = problem()
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Lars(params, lr=0.3)

    def steps(of: list[torch.nn.Parameter], its: Lars, which: slice) -> None:
        for step in gradients[which]:
            for param, gradient in zip(of, step, strict=True):
                param.grad = gradient.clone()
            its.step()

    steps(params, optimizer, slice(7))
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Lars(others, lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(params, optimizer, slice(7, None))
    steps(others, resumed, slice(7, None))
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"trust_coefficient": -1.0}, {"variant": "mine"}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Lars([torch.nn.Parameter(torch.ones(2))], **options)


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        Lars(table.parameters()).step()

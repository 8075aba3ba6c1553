"""Lamb against two other libraries, a plain float64 reference, and what the formula promises."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.optim.lamb import Lamb
from dlrm.optim.trust_ratios import layer_norms

SHAPES = [(16, 13), (16,), (33, 16), (33,), (1, 33), (1,), (2, 3, 4)]
STEPS = 20
DECAYS = [0.0, 0.01, 0.3]


def problem(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Weights as layers have them, and one gradient per step and weight, of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(shape, generator=generator, dtype=dtype) * (0.05, 0.3)[i % 2] for i, shape in enumerate(SHAPES)
    ]
    gradients = [
        [torch.randn(w.shape, generator=generator, dtype=dtype) * 10.0 ** -(i % 4) for i, w in enumerate(weights)]
        for _ in range(STEPS)
    ]
    return weights, gradients


def run(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], seed: int = 0) -> list[torch.Tensor]:
    """The weights after all steps of an optimizer on the problem."""
    weights, gradients = problem(seed)
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = make(params)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    return [param.detach() for param in params]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.fixture
def timm_lamb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give timm's Lamb without running its packages' __init__ files, which want torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    folder = Path(spec.submodule_search_locations[0])
    for name, path in {"timm": folder, "timm.optim": folder / "optim"}.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("timm.optim.lamb").Lamb
    for name in [name for name in sys.modules if name.startswith("timm.optim.")]:
        del sys.modules[name]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("trust_clip", [False, True])
def test_equals_timm(timm_lamb: Any, decay: float, max_grad_norm: float | None, trust_clip: bool) -> None:
    options = {"lr": 0.01, "weight_decay": decay, "max_grad_norm": max_grad_norm, "trust_clip": trust_clip}
    theirs = run(lambda params: timm_lamb(params, always_adapt=True, **options))
    ours = run(lambda params: Lamb(params, exclude_1d=False, **options))
    assert largest_difference(ours, theirs) < 1e-6


def test_without_always_adapt_equals_timm_without_decay(timm_lamb: Any) -> None:
    theirs = run(lambda params: timm_lamb(params, lr=0.01, weight_decay=0.0, max_grad_norm=None, always_adapt=False))
    ours = run(lambda params: Lamb(params, lr=0.01, weight_decay=0.0, always_adapt=False))
    assert largest_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("decay", DECAYS)
def test_equals_optax(decay: float) -> None:
    optax = pytest.importorskip("optax", reason="optax is not installed")
    weights, gradients = problem()
    transform = optax.lamb(0.01, b1=0.9, b2=0.999, eps=1e-6, weight_decay=decay)
    theirs = [w.numpy() for w in weights]
    state = transform.init(theirs)
    for step in gradients:
        updates, state = transform.update([g.numpy() for g in step], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    ours = run(lambda params: Lamb(params, lr=0.01, weight_decay=decay, exclude_1d=False))
    assert largest_difference(ours, [torch.from_numpy(np.array(w)) for w in theirs]) < 1e-6


def plain_lamb(
    weights: list[np.ndarray], gradients: list[list[np.ndarray]], *, decay: float, max_grad_norm: float | None
) -> list[np.ndarray]:
    """The seven lines of the formula in float64, with one-dimensional tensors excluded."""
    means, squares = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for t, step in enumerate(gradients, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in step))
        c = max(1.0, norm / max_grad_norm) if max_grad_norm else 1.0
        for i, w in enumerate(weights):
            g = step[i] / c
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.999 * squares[i] + 0.001 * g * g
            r = means[i] / (1 - 0.9**t) / (np.sqrt(squares[i] / (1 - 0.999**t)) + 1e-6)
            u = r + (decay * w if w.ndim > 1 else 0.0)
            q = np.linalg.norm(w.ravel()) / np.linalg.norm(u.ravel()) if w.ndim > 1 else 1.0
            weights[i] = w - 0.01 * q * u
    return weights


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_equals_the_formula_in_float64(decay: float, max_grad_norm: float | None) -> None:
    weights, gradients = problem(dtype=torch.float64)
    expected = plain_lamb(
        [w.numpy() for w in weights],
        [[g.numpy() for g in s] for s in gradients],
        decay=decay,
        max_grad_norm=max_grad_norm,
    )
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Lamb(params, lr=0.01, weight_decay=decay, max_grad_norm=max_grad_norm)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient
        optimizer.step()
    assert largest_difference([p.detach() for p in params], [torch.from_numpy(w) for w in expected]) < 1e-12


def one_step(weight: torch.Tensor, gradient: torch.Tensor, **options: Any) -> torch.Tensor:
    """The change of one tensor in the first step."""
    param = torch.nn.Parameter(weight.clone())
    param.grad = gradient
    Lamb([param], **options).step()
    return param.detach() - weight


@pytest.mark.parametrize("decay", DECAYS)
def test_a_step_is_as_long_as_the_rate_times_the_weights(decay: float) -> None:
    weights, gradients = problem(seed=3, dtype=torch.float64)
    params = [torch.nn.Parameter(w) for w in weights if w.ndim > 1]
    matrices = [i for i, w in enumerate(weights) if w.ndim > 1]
    optimizer = Lamb(params, lr=0.02, weight_decay=decay)
    for step in gradients[:5]:
        before = [param.detach().clone() for param in params]
        for param, i in zip(params, matrices, strict=True):
            param.grad = step[i]
        optimizer.step()
        changes = layer_norms([p.detach() - b for p, b in zip(params, before, strict=True)])
        torch.testing.assert_close(changes, 0.02 * layer_norms(before), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    weight, gradient = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = one_step(weight, gradient, lr=0.1, eps=1e-300)
    torch.testing.assert_close(one_step(weight, gradient * scale, lr=0.1, eps=1e-300), expected, rtol=1e-10, atol=0.0)


def test_zero_weights_move_as_with_adam() -> None:
    sign = torch.randn(5, 7).sign()
    gradient = sign * (0.1 + torch.rand(5, 7))  # well above eps
    torch.testing.assert_close(one_step(torch.zeros(5, 7), gradient, lr=0.1), -0.1 * sign, rtol=1e-4, atol=0.0)


def test_a_zero_update_stays_finite() -> None:
    weight = torch.randn(5, 7)
    assert torch.equal(one_step(weight, torch.zeros(5, 7), weight_decay=0.0), torch.zeros(5, 7))


def test_one_dimensional_tensors_move_as_with_adam_without_decay() -> None:
    weight, gradient = torch.full((6,), 50.0), torch.randn(6)
    torch.testing.assert_close(one_step(weight, gradient, lr=0.5), -0.5 * gradient.sign(), rtol=1e-4, atol=1e-5)


def test_bias_correction_cancels_without_decay() -> None:
    with_correction, without = (
        run(
            lambda params, c=correct: Lamb(
                [p for p in params if p.ndim > 1], 0.01, weight_decay=0.0, eps=1e-30, bias_correction=c
            )
        )
        for correct in (True, False)
    )
    assert largest_difference(with_correction, without) < 1e-5
    with_decay, corrected = (
        run(
            lambda params, c=correct: Lamb([p for p in params if p.ndim > 1], 0.01, weight_decay=0.3, bias_correction=c)
        )
        for correct in (True, False)
    )
    assert largest_difference(with_decay, corrected) > 1e-3


def test_gradients_are_left_as_they_were() -> None:
    param = torch.nn.Parameter(torch.randn(4, 4))
    gradient = torch.randn(4, 4) * 100
    param.grad = gradient.clone()
    Lamb([param], max_grad_norm=1.0).step()
    assert torch.equal(param.grad, gradient)


def test_only_large_gradients_are_scaled() -> None:
    """With a large eps, which makes the gradient's scale matter."""
    weight, gradient = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    gradient *= 2.0 / gradient.norm()
    plain = one_step(weight, gradient, eps=1.0, lr=0.1)
    assert torch.equal(one_step(weight, gradient, eps=1.0, lr=0.1, max_grad_norm=10.0), plain)
    torch.testing.assert_close(one_step(weight, gradient * 8, eps=1.0, lr=0.1, max_grad_norm=2.0), plain)
    assert float((one_step(weight, gradient * 8, eps=1.0, lr=0.1) - plain).abs().max()) > 1e-3


def test_norms_of_large_tensors_are_accurate() -> None:
    tensor = torch.full((4_000_000,), 0.1)
    assert float(layer_norms([tensor])[0]) == pytest.approx(float(tensor[0]) * 2000.0, rel=2e-7)


def test_a_parameter_counts_only_its_own_steps() -> None:
    """One that had no gradient at first then moves as if it were at its first step."""
    weights, gradients = problem()
    params = [torch.nn.Parameter(weights[0].clone()), torch.nn.Parameter(weights[2].clone())]
    optimizer = Lamb(params, lr=0.01, weight_decay=0.3)
    for step in gradients[:5]:
        params[0].grad = step[0]
        optimizer.step()
    params[1].grad = gradients[5][2]
    optimizer.step()
    assert torch.equal(
        params[1].detach() - weights[2], one_step(weights[2], gradients[5][2], lr=0.01, weight_decay=0.3)
    )


def test_the_ratio_is_of_the_bounded_norm() -> None:
    weight, gradient = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    norm = float(weight.norm())
    for bounds, expected in [
        ((0.0, norm / 2), norm / 2),
        ((2 * norm, 9 * norm), 2 * norm),
        ((norm / 2, 9 * norm), norm),
    ]:
        change = one_step(weight, gradient, lr=0.1, norm_bounds=bounds)
        assert float(change.norm()) == pytest.approx(0.1 * expected, rel=1e-12)
    with pytest.raises(ValueError, match="norm_bounds of 0 <= least <= most"):
        Lamb([torch.nn.Parameter(weight)], norm_bounds=(2.0, 1.0))


def loss_after_training(make: Callable[[Any], torch.optim.Optimizer], scale: float, steps: int = 60) -> float:
    """Of four layers without biases, scaled in turns by a number and its inverse, which leaves the function alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 20, generator=generator)
    y = x[:, :4].sum(dim=1, keepdim=True).sin()
    weights = []
    for i, (rows, columns) in enumerate([(32, 20), (32, 32), (32, 32), (1, 32)]):
        drawn = torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5
        weights.append(torch.nn.Parameter(drawn * (scale if i % 2 else 1 / scale)))
    optimizer = make(weights)
    for _ in range(steps + 1):
        hidden = x
        for weight in weights[:-1]:
            hidden = (hidden @ weight.T).relu()
        loss = ((hidden @ weights[-1].T - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_one_rate_serves_hidden_layers_of_any_scale() -> None:
    """Adam's, which is as good where layers are of one scale, leaves nothing of the function where they are not."""
    scales = (0.1, 1.0, 10.0)
    lamb = [loss_after_training(lambda p: Lamb(p, 0.02, weight_decay=0.0, eps=1e-12), scale) for scale in scales]
    adam = [loss_after_training(lambda p: torch.optim.Adam(p, 0.02), scale) for scale in scales]
    assert max(lamb) < 0.02
    assert adam[1] < 0.02
    assert min(adam[0], adam[2]) > 0.3

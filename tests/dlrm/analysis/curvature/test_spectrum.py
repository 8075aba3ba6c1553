"""Eigenvalues, densities and traces against matrices whose spectrum is known, and a network's exact Hessian."""

from __future__ import annotations

import math

import pytest
import torch

from dlrm.analysis.curvature.lanczos import lanczos, random_start
from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.spectrum import density, estimate_trace, find_extremes, probe_spectrum, share_below

SIZE = 300


def rotation(size=SIZE, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def spectrum():
    """Most eigenvalues small, both signs, and some that stick out, as Hessians of networks have them."""
    bulk = torch.linspace(-0.5, 0.5, SIZE - 6, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([-2.0, 3.0, 5.0, 8.0, 20.0, 50.0], dtype=torch.float64)])


@pytest.mark.parametrize("turned", [False, True])
def test_extremes_of_a_known_hessian_within_a_percent(quadratic, turned):
    values = spectrum()
    objective = quadratic(values, torch.randn(SIZE).double(), rotation() if turned else None)
    at = objective.weights()
    ritz = find_extremes(lambda vector: objective.hessian_product(at, vector), at)
    assert ritz.largest[0] == pytest.approx(50.0, rel=0.01)
    assert ritz.smallest[0] == pytest.approx(-2.0, rel=0.01)
    assert len(ritz.values) < 80
    for value, error in (ritz.smallest, ritz.largest):
        assert (values - value).abs().min() <= error + 1e-9


@pytest.mark.parametrize("turned", [False, True])
def test_trace_of_a_known_hessian_within_five_percent(quadratic, turned):
    values = torch.linspace(0.1, 10, SIZE).double()
    objective = quadratic(values, torch.zeros(SIZE).double(), rotation() if turned else None)
    at = objective.weights()
    probes = [
        probe_spectrum(lambda vector: objective.hessian_product(at, vector), at, steps=8, seed=seed)
        for seed in range(20)
    ]
    trace, error = estimate_trace(probes, SIZE)
    assert trace == pytest.approx(float(values.sum()), rel=0.05)
    if turned:
        assert 0 < abs(trace - float(values.sum())) < 3 * error
    assert math.isnan(estimate_trace(probes[:1], SIZE)[1])


def test_the_density_has_its_mass_where_the_eigenvalues_are():
    values = spectrum()
    turn = rotation()
    matrix = turn.T @ torch.diag(values) @ turn
    probes = [probe_spectrum(lambda v: matrix @ v, values, steps=60, seed=seed) for seed in range(20)]
    at = torch.linspace(-10, 60, 7001, dtype=torch.float64)
    found = density(probes, at, 0.1)
    assert torch.trapezoid(found, at).item() == pytest.approx(1.0, abs=1e-6)
    exact = torch.exp(-0.5 * ((at[:, None] - values) / 0.1).square()).mean(dim=1) / (0.1 * math.sqrt(2 * math.pi))
    assert torch.trapezoid((found - exact).abs(), at).item() < 0.1
    below = (values < -0.25).double().mean().item()
    assert share_below(probes, -0.25) == pytest.approx(below, abs=0.03)


def test_a_networks_extremes_are_those_of_its_exact_hessian(mlp, mlp_parts, exact_hessian):
    objective = Objective(mlp, mlp_parts)
    at = objective.weights()
    exact = torch.linalg.eigvalsh(exact_hessian(list(objective.shapes)))
    product = lambda vector: objective.hessian_product(at, vector)  # noqa: E731
    ritz = find_extremes(product, at, tolerance=1e-8)
    assert ritz.largest[0] == pytest.approx(exact[-1].item(), rel=1e-6)
    assert ritz.smallest[0] == pytest.approx(exact[0].item(), rel=1e-6)
    signs = random_start(len(at), 5, at)
    hutchinson = signs @ exact_hessian(list(objective.shapes)) @ signs
    trace, _ = estimate_trace([probe_spectrum(product, at, seed=5)], len(at))
    assert trace == pytest.approx(hutchinson.item(), rel=1e-9)


def test_as_many_steps_as_rows_give_every_eigenvalue_once():
    values = torch.cat([torch.linspace(1, 2, 59), torch.tensor([1000.0])]).double()
    turn = rotation(60)
    matrix = turn.T @ torch.diag(values) @ turn
    ritz = lanczos(lambda vector: matrix @ vector, torch.randn(60).double(), 500)
    torch.testing.assert_close(ritz.values, values, rtol=1e-9, atol=1e-9)
    assert ritz.weights.sum().item() == pytest.approx(1.0)


def test_a_space_that_is_exhausted_ends_early_and_is_exact():
    ritz = lanczos(lambda vector: 3 * vector, torch.ones(40).double(), 30)
    assert ritz.values.tolist() == pytest.approx([3.0])
    assert ritz.errors.tolist() == pytest.approx([0.0])


@pytest.mark.parametrize(("start", "steps"), [(torch.zeros(4), 3), (torch.ones(4), 0)])
def test_a_start_of_zeros_or_no_step_is_an_error(start, steps):
    with pytest.raises(ValueError, match="expected at least 1 step and a start that is not zero"):
        lanczos(lambda vector: vector, start, steps)


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="expected products of finite numbers, got others in step 1"):
        lanczos(lambda vector: vector * math.nan, torch.ones(4), 3)

"""The highest loss in a box: exact for a quadratic, whose maximum is at a corner; a lower bound for others."""

from __future__ import annotations

import sys

import pytest
import torch

from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.sharpness import measure_sharpness


def percent(start: torch.Tensor, highest: torch.Tensor) -> float:
    return (100 * (highest - start) / (1 + start)).item()


@pytest.mark.parametrize("reach", [1e-3, 5e-4, 0.3])
@pytest.mark.parametrize("at_minimum", [False, True])
def test_a_diagonal_quadratics_maximum_is_the_corner_of_the_box(quadratic, reach, at_minimum):
    curvatures = torch.logspace(-3, 3, 80).double()
    at = torch.randn(80).double()
    if at_minimum:
        at[::2] = 0
    objective = quadratic(curvatures, at)
    corner = at.abs() + reach * (at.abs() + 1)
    expected = percent(0.5 * curvatures @ at.square(), 0.5 * curvatures @ corner.square())
    assert measure_sharpness(objective, at, reach=reach).percent == pytest.approx(expected, rel=1e-9)


def test_from_the_very_minimum_it_still_finds_the_corner(quadratic):
    curvatures = torch.linspace(1, 100, 50).double()
    objective = quadratic(curvatures, torch.zeros(50).double())
    found = measure_sharpness(objective, objective.weights(), reach=1e-3)
    assert found.start == 0
    assert found.percent == pytest.approx(100 * 0.5 * float(curvatures.sum()) * 1e-6, rel=1e-9)


def test_a_subspace_of_one_direction_is_a_line_whose_ends_are_known(quadratic):
    """Of one column a, z is one number with |z| <= reach * (|a.w| + 1); the maximum lies at one of its ends."""
    curvatures, at = torch.linspace(1, 5, 30).double(), torch.randn(30).double()
    objective = quadratic(curvatures, at)
    found = measure_sharpness(objective, at, reach=0.1, subspace=1, seed=4)
    drawn = torch.randn(30, 1, generator=torch.Generator().manual_seed(4))
    column = (drawn / drawn.norm()).double()[:, 0]
    limit = 0.1 * ((column @ at) / (column @ column)).abs() + 0.1
    ends = [0.5 * curvatures @ (at + sign * limit * column).square() for sign in (1, -1)]
    assert found.percent == pytest.approx(percent(0.5 * curvatures @ at.square(), max(ends)), rel=1e-6)


def test_a_larger_box_is_never_less_sharp_and_random_corners_are_never_higher(mlp, mlp_parts):
    objective = Objective(mlp, mlp_parts)
    at = objective.weights()
    small, large = (measure_sharpness(objective, at, reach=reach) for reach in (5e-3, 2e-2))
    assert 0 < small.percent < large.percent
    box = 2e-2 * (at.abs() + 1)
    for _ in range(200):
        corner = at + box * (2.0 * torch.randint(0, 2, at.shape) - 1)
        assert objective.value(corner) < large.highest


def test_without_scipy_the_error_says_what_to_install(quadratic, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    objective = quadratic(torch.ones(2), torch.ones(2))
    with pytest.raises(
        ValueError, match=r"expected scipy, found none; install it with `pip install 'recforge\[study\]'`"
    ):
        measure_sharpness(objective, objective.weights())


@pytest.mark.parametrize("setting", [{"reach": 0.0}, {"iterations": 0}, {"subspace": 0}])
def test_numbers_that_are_not_above_zero_are_errors(quadratic, setting):
    objective = quadratic(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="expected numbers above 0"):
        measure_sharpness(objective, objective.weights(), **setting)

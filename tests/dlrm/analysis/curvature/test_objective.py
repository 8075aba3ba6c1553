"""Losses, gradients and Hessian products are those of the whole sample, whatever parts it comes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dlrm.analysis.curvature.objective import Objective
from dlrm.interaction import DotInteraction

NAMES = ["network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias", "scale"]


@pytest.mark.parametrize("names", [NAMES, ["network.2.weight", "network.0.bias"]])
def test_hessian_products_are_those_of_the_exact_hessian(mlp, mlp_parts, exact_hessian, names):
    objective = Objective(mlp, mlp_parts, names=names)
    at = objective.weights()
    products = torch.stack([objective.hessian_product(at, column) for column in torch.eye(len(at)).double()], dim=1)
    torch.testing.assert_close(products, exact_hessian(names), rtol=1e-10, atol=1e-13)


def test_values_and_gradients_are_means_over_all_samples(mlp, mlp_parts, points):
    objective = Objective(mlp, mlp_parts)
    value, gradient = objective.gradient(objective.weights())
    loss = mlp(points)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in mlp.parameters()])
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert objective.value(objective.weights()) == pytest.approx(loss.item(), rel=1e-12)


def test_where_gradients_are_off_derivatives_are_no_zeros(mlp, mlp_parts):
    objective = Objective(mlp, mlp_parts)
    at = objective.weights()
    with torch.no_grad():
        product, gradient = objective.hessian_product(at, torch.ones_like(at)), objective.gradient(at)[1]
    assert product.norm() > 0
    assert gradient.norm() > 0


def test_a_loss_that_is_linear_has_no_curvature():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, part):
            return (self.weights * torch.arange(3.0)).sum()

    objective = Objective(Linear(), [(None, 1)])
    assert objective.gradient(objective.weights())[1].tolist() == [0, 1, 2]
    assert objective.hessian_product(objective.weights(), torch.ones(3)).tolist() == [0, 0, 0]


def test_the_dot_interaction_differentiates_twice_in_float64_and_refuses_in_float32():
    class Dots(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dots, self.linear = DotInteraction(4, 3), nn.Linear(3, 3, dtype=dtype)
            self.numbers = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
            self.pooled = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)

        def forward(self, part):
            return self.dots(torch.tanh(self.linear(self.numbers)), self.pooled).pow(3).mean()

    objective = Objective(Dots(torch.float64), [(None, 1)])
    at = objective.weights()
    direction, step = torch.randn_like(at), 1e-5
    ends = [objective.gradient(at + sign * step * direction)[1] for sign in (1, -1)]
    product = objective.hessian_product(at, direction)
    torch.testing.assert_close(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    single = Objective(Dots(torch.float32), [(None, 1)])
    with pytest.raises(RuntimeError, match="no autograd formula"):
        single.hessian_product(single.weights(), torch.ones(12))


def test_a_name_that_no_parameter_has_is_an_error(mlp, mlp_parts):
    with pytest.raises(ValueError, match=r"expected names of parameters, got head\.weight"):
        Objective(mlp, mlp_parts, names=["scale", "head.weight"])

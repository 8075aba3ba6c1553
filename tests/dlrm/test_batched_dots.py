"""The GPU's dot interaction against the plain formula and its gradient; it runs on any device."""

from __future__ import annotations

import pytest
import torch

from dlrm.batched_dots import batched_dots
from dlrm.pairwise_dots import pairwise_dots_by_products


def draw(batch_size, features, dim, dtype):
    torch.manual_seed(0)
    dense = torch.randn(batch_size, dim, dtype=dtype, requires_grad=True)
    return dense, torch.randn(batch_size, features * dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("batch_size", "features", "dim"), [(5, 26, 8), (3, 1, 4), (2, 0, 4), (0, 3, 4)])
def test_outputs_and_gradients_are_those_of_the_formula(batch_size, features, dim):
    inputs = draw(batch_size, features, dim, torch.float64)
    out, expected = batched_dots(*inputs), pairwise_dots_by_products(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(one.sin().sum(), inputs) for one in (out, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_its_gradient_has_a_gradient():
    assert torch.autograd.gradgradcheck(batched_dots, draw(2, 2, 3, torch.float64))


def test_under_autocast_it_works_in_that_type():
    dense, pooled = draw(4, 3, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = batched_dots(dense, pooled)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert (dense.grad.dtype, pooled.grad.dtype) == (torch.float32, torch.float32)
    expected = torch.autograd.grad(pairwise_dots_by_products(dense, pooled).sum(), pooled)[0]
    torch.testing.assert_close(pooled.grad, expected, rtol=3e-2, atol=3e-2)

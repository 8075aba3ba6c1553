"""Interactions against formulas written out in float64, torchrec's cross network, and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from dlrm.interaction import CrossInteraction, DotInteraction, FactorizationMachine
from dlrm.pairwise_dots import _gradient_on_cpu, _pairwise_dots_on_cpu, pairwise_dots, pairwise_dots_by_products
from embeddings.kernels.vectors import LANES


def draw(batch_size, features, dim, dtype=torch.float32):
    torch.manual_seed(0)
    dense = torch.randn(batch_size, dim, dtype=dtype, requires_grad=True)
    pooled = torch.randn(batch_size, features * dim, dtype=dtype, requires_grad=True)
    return dense, pooled


def outputs_and_gradients(function, dense, pooled):
    out = function(dense, pooled)
    gradients = torch.autograd.grad(out.sin().sum(), (dense, pooled))
    return out.detach(), *gradients


def test_the_products_of_all_pairs_come_in_the_order_of_the_dlrm_paper():
    dense, pooled = draw(2, 3, 5, torch.float64)
    out = pairwise_dots_by_products(dense, pooled)
    assert torch.equal(out[:, :5], dense)
    for sample in range(2):
        vectors = [dense[sample], *pooled[sample].split(5)]
        expected = [vectors[i] @ vectors[j] for i in range(4) for j in range(i)]
        torch.testing.assert_close(out[sample, 5:], torch.stack(expected))


@settings(max_examples=60, deadline=None)
@given(
    batch_size=st.integers(0, 300),
    features=st.integers(0, 11),
    dim=st.sampled_from([1, 3, LANES, 2 * LANES, 40, 3 * LANES]),
)
def test_the_kernels_equal_batched_products_in_float64(batch_size, features, dim):
    dense, pooled = draw(batch_size, features, dim)
    got = outputs_and_gradients(pairwise_dots, dense, pooled)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (dense, pooled)]
    expected = outputs_and_gradients(pairwise_dots_by_products, *doubles)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_the_reference_has_the_gradient_of_its_output():
    assert torch.autograd.gradcheck(pairwise_dots_by_products, draw(3, 2, 4, torch.float64))


def test_float64_stays_float64():
    dense, pooled = draw(3, 2, 4, torch.float64)
    assert torch.equal(pairwise_dots(dense, pooled), pairwise_dots_by_products(dense, pooled))


def test_views_and_expanded_gradients_are_read_where_they_lie():
    dense, pooled = draw(4, 3, 8)
    transposed = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in (dense, pooled)]
    assert not transposed[0].is_contiguous()
    assert torch.equal(pairwise_dots(*transposed), pairwise_dots(dense, pooled))
    pairwise_dots(*transposed).sum().backward()
    pairwise_dots(dense, pooled).sum().backward()
    for one, other in zip(transposed, (dense, pooled), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_nan_and_infinity_pass_through():
    # The guards look for them after the step; a vector with one poisons its own products and no others.
    dense, pooled = (tensor.detach() for tensor in draw(2, 3, 4))
    pooled[0, 5] = float("nan")
    out = pairwise_dots(dense, pooled)
    expected = pairwise_dots_by_products(dense, pooled)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()


def test_the_result_is_the_same_for_any_number_of_threads():
    dense, pooled = draw(1000, 5, 12)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(pairwise_dots, dense, pooled))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_torch_accepts_the_operators():
    dense, pooled = draw(5, 3, 8)
    gradient = torch.randn(5, 8 + 6)
    for operator, arguments in (
        (_pairwise_dots_on_cpu, (dense, pooled)),
        (_gradient_on_cpu, (dense.detach(), pooled.detach(), gradient)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_the_compiler_sees_one_operator_and_no_graph_break():
    dense, pooled = draw(5, 3, 8)
    compiled = torch.compile(DotInteraction(4, 8), fullgraph=True, backend="aot_eager")
    for one, other in zip(
        outputs_and_gradients(compiled, dense, pooled),
        outputs_and_gradients(DotInteraction(4, 8), dense, pooled),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("projection", [None, 3])
def test_autocast_changes_rounding_only(projection):
    dense, pooled = (tensor.detach() for tensor in draw(6, 3, 8))
    interaction = DotInteraction(4, 8, projection)
    exact = interaction(dense, pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = interaction(dense.bfloat16(), pooled)
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.1)


def test_projection_multiplies_vectors_with_combinations_of_them():
    dense, pooled = draw(2, 3, 5)
    interaction = DotInteraction(4, 5, projection=2)
    out = interaction(dense, pooled)
    assert out.shape == (2, interaction.out_dim) == (2, 5 + 4 * 2)
    assert torch.equal(out[:, :5], dense)
    for sample in range(2):
        vectors = torch.stack([dense[sample], *pooled[sample].split(5)])
        expected = [
            sum(weight * (vector @ other) for weight, other in zip(combination, vectors, strict=True))
            for vector in vectors
            for combination in interaction.combinations
        ]
        torch.testing.assert_close(out[sample, 5:], torch.stack(expected))


def test_cross_interaction_equals_torchrecs():
    torch.manual_seed(0)
    dense, pooled = torch.randn(7, 5), torch.randn(7, 11)
    ours, theirs = CrossInteraction(16, rank=3, layers=2), LowRankCrossNet(16, num_layers=2, low_rank=3)
    for layer in range(2):
        nn.init.normal_(ours.up[layer].bias)
        theirs.W_kernels[layer].data.copy_(ours.up[layer].weight)
        theirs.V_kernels[layer].data.copy_(ours.down[layer].weight)
        theirs.bias[layer].data.copy_(ours.up[layer].bias)
    out = ours(dense, pooled)
    torch.testing.assert_close(out, theirs(torch.cat([dense, pooled], dim=1)))
    assert out.shape == (7, ours.out_dim)


def test_factorization_machine_multiplies_all_pairs_by_component():
    dense, pooled = draw(2, 3, 5, torch.float64)
    out = FactorizationMachine(4, 5)(dense, pooled)
    assert out.shape == (2, 15)
    vectors = [dense, *pooled.split(5, dim=1)]
    pairs = sum(one * other for one, other in itertools.combinations(vectors, 2))
    torch.testing.assert_close(out, torch.cat([dense, sum(vectors[1:]), pairs], dim=1))


@pytest.mark.parametrize("interaction", [DotInteraction(4, 8), DotInteraction(4, 8, 2), FactorizationMachine(4, 8)])
def test_vectors_that_do_not_fit_are_refused(interaction):
    with pytest.raises(ValueError, match=r"width 8 and pooled rows of width 24 \(3 features\), got 8 and 16"):
        interaction(torch.zeros(2, 8), torch.zeros(2, 16))

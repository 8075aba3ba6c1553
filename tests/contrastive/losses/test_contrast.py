"""InfoNCE and the regularisers are those of the formulas, by two ways of computing them; InfoNCE is a library's too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from torch import Tensor

from contrastive.losses.contrast import contrast
from contrastive.losses.fused_contrast import fused_contrast
from contrastive.losses.info_nce import info_nce
from contrastive.losses.regulariser import batch_regulariser, row_regulariser


def draw_views(size: int, dim: int, *, alike: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Views whose positives lie below their hardest negatives for `alike` 0, above them for 5, and between for 1."""
    generator = torch.Generator().manual_seed(size)
    shared = alike * torch.randn(size, dim, generator=generator, dtype=torch.float64)
    first, second = (shared + torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return (0.5 * first).to(dtype).requires_grad_(), (0.5 * second).to(dtype).requires_grad_()


def value_and_gradients(loss: Tensor, *views: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, views)]


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alike", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("term", ["info_nce", "row_regulariser", "batch_regulariser"])
def test_terms_and_gradients_are_those_of_the_formulas(formulas: SimpleNamespace, term: str, alike: float) -> None:
    views = draw_views(5, 4, alike=alike)
    ours = {"info_nce": info_nce, "row_regulariser": row_regulariser, "batch_regulariser": batch_regulariser}[term]
    expected = value_and_gradients(getattr(formulas, term)(*views), *views)
    assert_equal(value_and_gradients(ours(contrast(*views)), *views), expected)


def test_drawn_views_have_margins_on_both_sides() -> None:
    above = {}
    for alike in (0.0, 1.0, 5.0):
        pairs = contrast(*draw_views(5, 4, alike=alike))
        above[alike] = (pairs.positives > pairs.negatives().amax(1)).double().mean().item()
    assert above[0.0] == 0.0
    assert 0.0 < above[1.0] < 1.0
    assert above[5.0] > above[1.0]


@pytest.mark.parametrize("alike", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_fused_contrast_is_that_of_the_formulas(
    formulas: SimpleNamespace, weight: float, alike: float, temperature: float
) -> None:
    views = draw_views(4, 3, alike=alike)
    scaled = [view / temperature**0.5 for view in views]  # the regulariser's products are divided too
    expected = formulas.info_nce(*views, temperature) + weight * formulas.row_regulariser(*scaled)
    got = fused_contrast(*views, temperature, weight)
    assert_equal(value_and_gradients(3.0 * got.loss, *views), value_and_gradients(3.0 * expected, *views))
    torch.testing.assert_close(got.info_nce, formulas.info_nce(*views, temperature), rtol=1e-12, atol=0)
    if weight:
        torch.testing.assert_close(got.regulariser, formulas.row_regulariser(*scaled), rtol=1e-11, atol=0)
    else:
        assert got.regulariser is None


def test_fused_contrast_in_float32_stays_close_on_a_full_batch() -> None:
    views = draw_views(256, 64, alike=1.0)
    pairs = contrast(*views)
    expected = value_and_gradients(info_nce(pairs) + 0.1 * row_regulariser(pairs), *views)
    singles = draw_views(256, 64, alike=1.0, dtype=torch.float32)
    got = value_and_gradients(fused_contrast(*singles, weight=0.1).loss, *singles)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(("loss", "size"), [(SupConLoss, 24), (NTXentLoss, 6)])
@pytest.mark.parametrize("fused", [True, False])
def test_info_nce_is_the_metric_learning_librarys(loss: Callable[..., torch.nn.Module], size: int, fused: bool) -> None:
    views = draw_views(size, 8, alike=1.0)
    oracle = loss(temperature=1.0, distance=DotProductSimilarity(normalize_embeddings=False))
    expected = value_and_gradients(oracle(torch.cat(views), torch.arange(size).repeat(2)), *views)
    ours = fused_contrast(*views).loss if fused else info_nce(contrast(*views))
    assert_equal(value_and_gradients(ours, *views), expected)


def test_products_far_apart_overflow_nothing() -> None:
    first, second = (torch.tensor([[40.0, x], [2.0, 35.0], [-30.0, 5.0]], requires_grad=True) for x in (1.0, 3.0))
    got = value_and_gradients(fused_contrast(first, 0.9 * second, 0.5, 0.1).loss, first, second)
    expected = value_and_gradients(by_formulas(first, 0.9 * second), first, second)
    assert all(part.isfinite().all() for part in got)
    assert_equal(got, expected, 1e-5)


def by_formulas(first: Tensor, second: Tensor) -> Tensor:
    pairs = contrast(first, second, 0.5)
    return info_nce(pairs) + 0.1 * row_regulariser(pairs)


@pytest.mark.parametrize("loss", [by_formulas, lambda first, second: fused_contrast(first, second, 0.5, 0.1).loss])
def test_gradients_can_be_differentiated(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert torch.autograd.gradgradcheck(loss, draw_views(3, 2, alike=1.0))


def test_what_cannot_be_contrasted_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected two views \[B, dim\], got \[3, 2\] and \[4, 2\]"):
        contrast(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="expected at least one sample in a batch, got none"):
        fused_contrast(torch.zeros(0, 2), torch.zeros(0, 2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda first, second: fused_contrast(first, second, 0.5, 0.1).loss,
        lambda first, second: info_nce(contrast(first, second)),
        lambda first, second: row_regulariser(contrast(first, second)),
        lambda first, second: batch_regulariser(contrast(first, second)),
    ],
)
def test_a_sample_by_itself_costs_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    views = draw_views(1, 3, alike=0.0)
    value, *gradients = value_and_gradients(loss(*views), *views)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)

"""InfoNCE and the regulariser of MCLRec's code over one buffer, in half the time of the formulas' own files."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive.losses.contrast import check_views, contrast
from contrastive.losses.info_nce import info_nce
from contrastive.losses.regulariser import row_regulariser
from contrastive.losses.softmax_in_place import softmax_in_place


class ContrastLoss(NamedTuple):
    """What two views of a batch cost, as scalars.

    Attributes:
        loss: InfoNCE and the weighted regulariser together; has the gradient.
        info_nce: For the log.
        regulariser: For the log; None where it has no weight.
    """

    loss: Tensor
    info_nce: Tensor
    regulariser: Tensor | None


def fused_contrast(first: Tensor, second: Tensor, temperature: float = 1.0, weight: float = 0.0) -> ContrastLoss:
    """``info_nce + weight * row_regulariser`` of two views [B, dim] each.

    The gradient is computed beside the value, as the products are at hand then. Where it is to be differentiated itself
    it is computed again, from the formulas' own files. A sample by itself, the last batch of an epoch maybe, has no
    negatives and costs nothing.

    Raises:
        ValueError: If the views' shapes differ, or if they are empty.
    """
    check_views(first, second)
    if len(first) == 1:
        nothing = 0.0 * (first * second).sum()
        return ContrastLoss(nothing, nothing.detach(), nothing.detach() if weight else None)
    loss, terms = _FusedContrast.apply(torch.cat([first, second]), temperature, weight)  # type: ignore[no-untyped-call]
    return ContrastLoss(loss, terms[0], terms[1] if weight else None)


class _FusedContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, temperature: float, weight: float) -> tuple[Tensor, Tensor]:
        similarities = torch.mm(vectors, vectors.T)
        if temperature != 1.0:
            similarities /= temperature
        terms, gradients = _contrast_in_place(similarities, weight)
        if ctx.needs_input_grad[0]:
            # the matrix of products is symmetric, its gradient is not
            both = torch.addmm(gradients @ vectors, gradients.T, vectors)
            ctx.save_for_backward(vectors, both.div_(len(vectors) * temperature))
            ctx.temperature, ctx.weight = temperature, weight
        ctx.mark_non_differentiable(terms)
        return terms[0] + weight * terms[1], terms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        vectors, vector_gradients = ctx.saved_tensors
        if torch.is_grad_enabled():
            first, second = vectors.chunk(2)
            pairs = contrast(first, second, ctx.temperature)
            loss = info_nce(pairs) + ctx.weight * row_regulariser(pairs)
            (vector_gradients,) = torch.autograd.grad(loss, vectors, create_graph=True)
        return vector_gradients * gradient, None, None


def _contrast_in_place(products: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Both terms, and the gradient of their sum by `products` [2B, 2B], times 2B and written over them."""
    count = len(products)
    size = count // 2
    upper, lower = products.diagonal(size), products.diagonal(-size)
    positives = upper.repeat(2)
    others = products.sum() - products.diagonal().sum() - positives.sum()
    for excluded in (products.diagonal(), upper, lower):
        excluded.fill_(-torch.inf)
    hardest, where = products.max(1)
    upper.copy_(positives[:size])
    lower.copy_(positives[:size])

    log_total = softmax_in_place(products)
    above = (positives - hardest).relu()
    regulariser = (2.0 * above + hardest).mean() - others / (count * (count - 2))
    terms = torch.stack([(log_total - positives).mean(), regulariser])

    # mean_ij of -n_ij, then what positives and hardest negatives have besides
    is_above = (above > 0).to(products.dtype)
    every = weight / (count - 2)
    products.sub_(every)
    products.diagonal().zero_()
    positive_gradients = 2.0 * weight * is_above + (every - 1.0)
    upper.add_(positive_gradients[:size])
    lower.add_(positive_gradients[size:])
    hardest_gradients = weight * (1.0 - 2.0 * is_above)
    products.scatter_add_(1, where.unsqueeze(1), hardest_gradients.unsqueeze(1))
    return terms, products

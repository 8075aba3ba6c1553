"""The next item among all of them, in little more than the time of its three matrix products.

torch's own cross entropy keeps two buffers of [B, n] and passes over them seven times. Here is one, which is products
at first, then probabilities, then the gradient of the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastive.losses.softmax_in_place import softmax_in_place

# Numbers of a block of products that stay in a core's cache: MKL takes twice as long for the whole of a wide product.
_NUMBERS_PER_BLOCK = 1 << 16
_COLUMNS_PER_BLOCK = 256


def full_softmax(hidden: Tensor, rows: Tensor, targets: Tensor, correction: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the next item, ``-log softmax(hidden @ rows.T + correction)[target]``.

    Products are taken in the rows' precision.

    Args:
        hidden: What stands for each history, [B, dim].
        rows: The items' rows, [n, dim]; that of PAD is a class too, which is never right.
        targets: Place of the right item among `rows`, [B] int64.
        correction: Added to the product with each row, other than that with a sample's own target; [n]. -inf leaves
            the row out. It gets no gradient.

    Returns:
        A scalar; 0 of no histories, as a rank may have of a small batch.

    Raises:
        ValueError: If shapes do not fit one another.
    """
    _check_shapes(hidden, rows, targets, correction)
    hidden = hidden.to(rows.dtype)
    loss: Tensor = _SoftmaxLoss.apply(hidden, rows, targets, correction)  # type: ignore[no-untyped-call]
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, targets: Tensor, correction: Tensor | None) -> Tensor:
        scores = _multiply(hidden, rows)
        right = scores.gather(1, targets.unsqueeze(1))
        if correction is not None:
            scores.add_(correction).scatter_(1, targets.unsqueeze(1), right)
        log_total = softmax_in_place(scores)
        # d loss / d score * B; in place, as nobody needs the probabilities themselves
        scores.scatter_add_(1, targets.unsqueeze(1), torch.full_like(right, -1.0))
        ctx.save_for_backward(hidden, rows, targets, correction, scores)
        return (log_total - right.squeeze(1)).sum() / max(1, len(hidden))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, rows, targets, correction, score_gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to be differentiated themselves
            score_gradients = _score_gradients(hidden, rows, targets, correction)
        scale = gradient / max(1, len(hidden))
        hidden_gradient = (score_gradients @ rows) * scale if ctx.needs_input_grad[0] else None
        row_gradients = score_gradients.T @ (hidden * scale) if ctx.needs_input_grad[1] else None
        return hidden_gradient, row_gradients, None, None


def _multiply(hidden: Tensor, rows: Tensor) -> Tensor:
    """[B, n] products, on the CPU in blocks of columns."""
    if hidden.device.type != "cpu":
        return hidden @ rows.T
    products = hidden.new_empty(len(hidden), len(rows))
    width = max(_COLUMNS_PER_BLOCK, _NUMBERS_PER_BLOCK // max(1, len(hidden)))
    for start in range(0, len(rows), width):
        block = slice(start, start + width)
        torch.mm(hidden, rows[block].T, out=products[:, block])
    return products


def _score_gradients(hidden: Tensor, rows: Tensor, targets: Tensor, correction: Tensor | None) -> Tensor:
    """The gradient of scores, times B, as a function of what the scores were made from."""
    scores, places = hidden @ rows.T, targets.unsqueeze(1)
    if correction is not None:
        scores = scores + correction.expand_as(scores).scatter(1, places, 0.0)
    return scores.softmax(1) - torch.zeros_like(scores).scatter(1, places, 1.0)


def _check_shapes(hidden: Tensor, rows: Tensor, targets: Tensor, correction: Tensor | None) -> None:
    if hidden.dim() != 2 or rows.dim() != 2 or hidden.shape[1] != rows.shape[1]:
        raise ValueError(f"full_softmax: expected [B, dim] and [n, dim], got {[*hidden.shape]} and {[*rows.shape]}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"full_softmax: expected one target for each of {len(hidden)} histories, got {len(targets)}")
    if correction is not None and correction.shape != rows.shape[:1]:
        raise ValueError(f"full_softmax: expected a correction for each of {len(rows)} rows, got {len(correction)}")

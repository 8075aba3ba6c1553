"""The next item among a few that were drawn, for catalogues too large for the softmax over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastive.losses.full_softmax import full_softmax


def sampled_softmax(hidden: Tensor, rows: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
    """Mean cross entropy of the next item against the rows that were drawn as negatives.

    With ``q_j`` how likely item ``j`` was to be drawn, for sample ``i`` with the target ``t``::

        loss_i = log(exp(s_it) + sum over drawn j != t of exp(s_ij - log q_j)) - s_it

    The sum's expectation is that of all items but the target, so that the whole estimates the full softmax (Bengio and
    Senecal 2008, without their correction of the target, which is there by no chance). An item drawn that happens to be
    a sample's target is none of its negatives. An item drawn several times stands here once, so that q is the
    probability of being drawn at all, or how often it is expected divided by how often it was drawn: both are unbiased.

    Args:
        hidden: What stands for each history, [B, dim].
        rows: The rows looked up, each item once, [n, dim].
        targets: Place of the right item among `rows`, [B] int64.
        log_q: [n] log of how likely a row was to be drawn; -inf for those that were not drawn.

    Returns:
        A scalar.

    Raises:
        ValueError: If shapes do not fit one another, or if nothing was drawn.
    """
    if log_q.shape != rows.shape[:1]:
        raise ValueError(f"sampled_softmax: expected a log_q for each of {len(rows)} rows, got {len(log_q)}")
    is_drawn = log_q > -torch.inf
    if not is_drawn.any():
        raise ValueError(
            f"sampled_softmax: expected negatives among {len(rows)} rows, got none; raise --sequence.negatives"
        )
    is_needed = is_drawn.scatter(0, targets, True)  # rows of histories alone are no classes
    places = is_needed.nonzero().squeeze(1)
    new_place = is_needed.cumsum(0) - 1
    correction = (-log_q).masked_fill(~is_drawn, -torch.inf)
    return full_softmax(hidden, rows[places], new_place[targets], correction[places].to(rows.dtype))

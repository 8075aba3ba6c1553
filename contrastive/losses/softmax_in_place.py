"""Scores to probabilities over the same memory, and what their logarithms need."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_in_place(scores: Tensor) -> Tensor:
    """Make probabilities of each row of [B, n] scores; returns the log of each row's sum of exponentials, [B]."""
    if scores.device.type != "cpu":
        return softmax_by_passes(scores)
    highest = scores.amax(1)
    # torch's kernel for the CPU goes row by row and reads a number before it writes there
    torch.softmax(scores, dim=1, out=scores)
    # The likeliest class has at least 1 / n, so that its log is exact however far the others are behind.
    return highest - scores.amax(1).log()


def softmax_by_passes(scores: Tensor) -> Tensor:
    """The same on any device, in passes of which each may be in place: on the CPU twice the time."""
    highest = scores.amax(1)
    scores.sub_(highest.unsqueeze(1)).exp_()
    totals = scores.sum(1)
    scores.div_(totals.unsqueeze(1))
    return highest + totals.log()

"""The learning-rate range test: the rate rises with every step, and the loss tells where it harms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The loss that a rate gives is known only after some steps; a rate where it turns was too high for a while.
MARGIN = 4.0
# A smoothed loss so many times its least one, or so much above where it began, has turned for good.
TURNED = 1.5


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What a range test has found.

    Attributes:
        factors: what multiplied the learning rates, in rising order.
        losses: smoothed, at each.
        largest: factor at the least smoothed loss: beyond, it rises.
        suggested: a factor to train with, `MARGIN` times lower.
        has_turned: whether the loss rose again at all; if not, larger factors may be better still.
    """

    factors: tuple[float, ...]
    losses: tuple[float, ...]
    largest: float
    suggested: float
    has_turned: bool


def range_test(course: Iterable[tuple[float, float]], *, smoothing: float = 0.9) -> RangeTest:
    """Find the largest useful factor (Smith 2017, "Cyclical learning rates", section 3.3).

    Args:
        course: (factor, training loss) step by step, the factors rising evenly in their logarithm; it is read until the
            loss is not finite or has clearly turned.
        smoothing: share of the mean so far that stays with each step; the mean has no bias towards its start.

    Raises:
        ValueError: the loss was not finite from the first step on.
    """
    factors: list[float] = []
    losses: list[float] = []
    mean = weight = 0.0
    for factor, loss in course:
        if not math.isfinite(loss):
            break
        mean, weight = smoothing * mean + (1 - smoothing) * loss, smoothing * weight + (1 - smoothing)
        factors.append(factor)
        losses.append(mean / weight)
        if _has_turned(losses):
            break
    if not losses:
        raise ValueError("range test: expected a finite loss at the least factor, got none; begin with a lower one")
    least = min(range(len(losses)), key=losses.__getitem__)
    return RangeTest(
        factors=tuple(factors),
        losses=tuple(losses),
        largest=factors[least],
        suggested=factors[least] / MARGIN,
        has_turned=least < len(losses) - 1 or len(losses) < 2,
    )


def rising_shape(low: float, high: float, samples: float) -> str:
    """Return the formula that rises from one factor to another over so many samples, for `Schedule.shape`."""
    return f"{low!r} * exp({samples:.0f}, gamma={high / low!r})"


def _has_turned(losses: Sequence[float]) -> bool:
    # A loss may be as low as one likes, but a classifier's begins near that of guessing.
    return len(losses) > 5 and losses[-1] > TURNED * max(min(losses), 1e-12) and losses[-1] > losses[0]

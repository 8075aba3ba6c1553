"""The batch size beyond which more samples buy hardly fewer steps: fitted to what was measured, with its three regions.

Samples E and steps S = E / B to a goal follow (S / S_min - 1) (E / E_min - 1) = 1 ("An Empirical Model of Large-Batch
Training", McCandlish et al. 2018), so that E(B) = E_min + S_min B: a straight line, whose slope over intercept is the
critical batch B_crit = E_min / S_min. There, a run takes twice the least samples and twice the least steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Within this share of the least possible counts as the least.
WITHIN = 0.1
PERFECT, DIMINISHING, MAXIMAL = "perfect scaling", "diminishing returns", "maximal parallelism"


class CriticalBatch(NamedTuple):
    """A fitted law.

    Attributes:
        least_samples: E_min, to the goal with the smallest batch, in the unit that was given.
        least_steps: S_min, to the goal with the largest.
        critical_batch: E_min / S_min, in samples.
        residuals: what was measured less what is fitted, of E, in the order of the batches.
    """

    least_samples: float
    least_steps: float
    critical_batch: float
    residuals: tuple[float, ...]

    def samples(self, batch_size: float) -> float:
        """Return E(B)."""
        return self.least_samples + self.least_steps * batch_size

    def steps(self, batch_size: float) -> float:
        """Return S(B)."""
        return self.samples(batch_size) / batch_size

    @property
    def perfect_up_to(self) -> float:
        """Batch up to which twice the batch is half the steps: at most `WITHIN` more than the least samples."""
        return WITHIN * self.critical_batch

    @property
    def maximal_from(self) -> float:
        """Batch from which no larger one saves much: at most `WITHIN` more than the least steps."""
        return self.critical_batch / WITHIN

    def region(self, batch_size: float) -> str:
        """Return which of the three regions a batch lies in."""
        if batch_size <= self.perfect_up_to:
            return PERFECT
        return DIMINISHING if batch_size < self.maximal_from else MAXIMAL


def fit_critical_batch(
    batches: Sequence[float], examples_to_target: Sequence[float], *, relative: bool = False
) -> CriticalBatch:
    """Fit E(B) = E_min + S_min B by linear least squares.

    Args:
        batches: B, in samples.
        examples_to_target: E at each, in samples, or in another unit, which the critical batch does not depend on.
        relative: make the residuals small beside E rather than as such, which is right where E spans decades.

    Raises:
        ValueError: there are fewer than two batches, or no line with E_min > 0 and S_min > 0 fits.
    """
    if len(batches) != len(examples_to_target) or len(set(batches)) < 2:
        raise ValueError(f"critical batch: expected at least two batch sizes with their samples, got {list(batches)}")
    sizes, examples = np.asarray(batches, np.float64), np.asarray(examples_to_target, np.float64)
    weights = 1 / examples if relative else None
    slope, intercept = (float(number) for number in np.polyfit(sizes, examples, 1, w=weights))
    if not slope > 0:
        raise ValueError(
            "critical batch: expected more samples to the goal with larger batches, got a slope of "
            f"{slope:.3g} samples per sample of the batch; it lies beyond the batches that were measured"
        )
    if not intercept > 0:
        raise ValueError(
            f"critical batch: expected samples to the goal left at batch 0, got {intercept:.3g}; it lies below the "
            "batches that were measured"
        )
    residuals = examples - (intercept + slope * sizes)
    return CriticalBatch(intercept, slope, intercept / slope, tuple(map(float, residuals)))


def range_over_subsets(
    batches: Sequence[float], examples_to_target: Sequence[float], *, relative: bool = False
) -> tuple[float, float] | None:
    """Return the least and the greatest critical batch over all fits that leave out one batch; None below four."""
    if len(batches) < 4:
        return None
    found = []
    for left_out in range(len(batches)):
        kept = [i for i in range(len(batches)) if i != left_out]
        try:
            fit = fit_critical_batch(
                [batches[i] for i in kept], [examples_to_target[i] for i in kept], relative=relative
            )
        except ValueError:
            return None
        found.append(fit.critical_batch)
    return min(found), max(found)


def explained_share(fit: CriticalBatch, batches: Sequence[float], examples_to_target: Sequence[float]) -> float:
    """Return R^2 of the fitted hyperbola S(B), over the logarithms of steps, as they are drawn."""
    measured = np.log(np.asarray(examples_to_target, np.float64) / np.asarray(batches, np.float64))
    fitted = np.log([fit.steps(batch) for batch in batches])
    return float(1 - np.square(measured - fitted).sum() / np.square(measured - measured.mean()).sum())


def find_most_useful(batches: Sequence[int], steps: Sequence[float], tolerance: float = 0.05) -> int:
    """Return the largest batch up to which each one takes fewer steps than the one before, by more than `tolerance`.

    Args:
        batches: in rising order.
        steps: to the goal with each.
        tolerance: as a share of the steps of the batch before.
    """
    best = 0
    for number in range(1, len(batches)):
        if steps[number] >= (1 - tolerance) * steps[best]:
            break
        best = number
    return batches[best]

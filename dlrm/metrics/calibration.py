"""The calibration curve of rows that come in ascending order of prediction, without holding them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlrm.metrics.score_keys import TieGroups


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Rows of neighbouring predictions."""

    samples: int
    mean_prediction: float
    mean_label: float


class CalibrationCurve:
    """Sums predictions and labels in bins of equal size, to one row.

    Where a border falls among rows of equal prediction, the labels of these are shared out evenly over both bins: their
    order carries no information.

    Args:
        rows: All rows that will be added.
        bins: Number of bins; at most one per row.
    """

    def __init__(self, rows: int, bins: int) -> None:
        bins = min(bins, rows)
        self._borders = np.arange(bins + 1) * rows // bins
        self._at_borders = np.zeros((2, bins + 1))
        self._seen = np.zeros((3, 1))

    def add(self, groups: TieGroups) -> None:
        """Add the next rows in ascending order."""
        steps = np.stack([groups.counts, groups.probabilities * groups.counts, groups.positives])
        # Running sums of rows, predictions and labels, straight within a group.
        rows, *courses = np.cumsum(np.concatenate([self._seen, steps], axis=1), axis=1)
        inside = (self._borders > rows[0]) & (self._borders <= rows[-1])
        for sums, course in zip(self._at_borders, courses, strict=True):
            sums[inside] = np.interp(self._borders[inside], rows, course)
        self._seen = np.array([[rows[-1]], *[[course[-1]] for course in courses]])

    def bins(self) -> tuple[CalibrationBin, ...]:
        """Return the bins in ascending order of prediction, once all rows were added."""
        samples, (predictions, labels) = np.diff(self._borders), np.diff(self._at_borders, axis=1)
        columns = (samples, predictions / samples, labels / samples)
        return tuple(
            CalibrationBin(samples=count, mean_prediction=prediction, mean_label=label)
            for count, prediction, label in zip(*(column.tolist() for column in columns), strict=True)
        )

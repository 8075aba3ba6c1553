"""How sure is an AUC, or a difference of two, when every run of every arm is measured on the same test rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.floating[Any]]]"

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the length of its 95 % confidence interval."""

    mean: float
    half: float


@dataclass(frozen=True)
class ArmScores:
    """What an arm's runs on the same test rows say, one run per seed.

    Attributes:
        aucs: [seeds].
        wins: [rows]; of a click the share of the other rows that it is ranked above, of another row the share of the
            clicks that are ranked above it, each the mean over seeds.
        labels: [rows], 0 or 1.
    """

    aucs: Numbers
    wins: Numbers
    labels: Numbers

    @classmethod
    def of(cls, scores: Sequence[Numbers], labels: Numbers) -> ArmScores:
        """Make them of each seed's scores [rows].

        Raises:
            ValueError: the labels are all alike.
        """
        clicks = int(labels.sum())
        if not 0 < clicks < len(labels):
            raise ValueError(f"expected test rows with and without a click, got {clicks} clicks of {len(labels)} rows")
        wins = np.stack([count_wins(its_scores, labels) for its_scores in scores])
        return cls(wins[:, labels > 0].mean(axis=1), wins.mean(axis=0), labels)


def count_wins(scores: Numbers, labels: Numbers) -> Numbers:
    """Return each row's share of wins against the rows of the other label [rows], a tie counting half.

    They are the components of DeLong, DeLong and Clarke-Pearson 1988: their mean over the clicks, and over the others
    alike, is the AUC.
    """
    clicks, others = np.sort(scores[labels > 0]), np.sort(scores[labels == 0])
    below = (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / (2 * len(others))
    above = 1 - (np.searchsorted(clicks, scores, "left") + np.searchsorted(clicks, scores, "right")) / (2 * len(clicks))
    return np.asarray(np.where(labels > 0, below, above), dtype=np.float64)


def mean_auc(arm: ArmScores) -> Interval:
    """Return the mean AUC over seeds; the interval covers other seeds and other test rows."""
    return _interval(arm.aucs, arm.wins, arm.labels)


def mean_gap(arm: ArmScores, other: ArmScores) -> Interval:
    """Return the mean of `arm`'s AUC less `other`'s, paired by seed and by test row."""
    return _interval(arm.aucs - other.aucs, arm.wins - other.wins, arm.labels)


def _interval(per_seed: Numbers, per_row: Numbers, labels: Numbers) -> Interval:
    """Add the variance over seeds, on these rows, to that over rows, of the mean over these seeds."""
    from scipy import stats

    clicks, others = per_row[labels > 0], per_row[labels == 0]
    rows = np.var(clicks, ddof=1) / len(clicks) + np.var(others, ddof=1) / len(others)
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) ** 2 * rows
    if len(per_seed) > 1:
        seeds = np.var(per_seed, ddof=1) / len(per_seed)
        half += stats.t.ppf((1 + CONFIDENCE) / 2, len(per_seed) - 1) ** 2 * seeds
    return Interval(float(per_seed.mean()), float(np.sqrt(half)))

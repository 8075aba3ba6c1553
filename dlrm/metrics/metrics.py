"""Exact metrics of a binary classifier over any number of rows, collected batch by batch in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dlrm.diverged import DivergedError
from dlrm.metrics.auc import RankSum, largest_segments, rank_sums
from dlrm.metrics.calibration import CalibrationBin, CalibrationCurve
from dlrm.metrics.score_keys import CHUNK_ROWS, MAX_SEGMENT, KeyFile, TieGroups, pack_keys, tie_groups

if TYPE_CHECKING:
    from torch import Tensor


CHANCE_STANDARD_ERRORS = 3.0
LOWER_IS_BETTER = ("logloss", "normalized_entropy")


@dataclass(frozen=True, kw_only=True)
class SegmentValues:
    """Metrics within one value of the segmenting feature; NaN where its labels do not allow one."""

    segment: int
    samples: int
    positives: int
    auc: float
    calibration: float
    mean_prediction: float


@dataclass(frozen=True, kw_only=True)
class MetricValues:
    """Metrics of one evaluation."""

    samples: int
    positives: int
    auc: float
    """Exact area under the ROC curve, ties counted half; NaN with one class only."""
    logloss: float
    """Mean cross-entropy in nats."""
    normalized_entropy: float
    """logloss / entropy of the share of positives (He et al. 2014); NaN with one class only."""
    calibration: float
    """Mean prediction / mean label; NaN without positives."""
    mean_prediction: float
    prediction_std: float
    """0 exactly if all predictions are equal."""
    undefined: str | None
    """Why some of the above are NaN, in one line; None if none is."""
    calibration_curve: tuple[CalibrationBin, ...]
    """Bins of equal size (to one row) in ascending order of prediction."""
    segments: tuple[SegmentValues, ...]
    """The largest segments, largest first; empty if none were given."""


class BinaryMetrics:
    """Collects logits and labels, and computes metrics from all of them.

    The state is a set of keys in a temporary file (8 bytes per row; 16 with segments), and results are computed from
    the sorted keys: they do not depend, to the last bit, on batches, their order, or which of several merged collectors
    saw them. Logits are compared as float32, in which -0.0 and 0.0 tie; sums are in float64.

    Args:
        directory: Where the temporary file lies; the system's temporary directory if None (mind those held in memory).
        segments: Whether every row comes with a segment.
        calibration_bins: Bins of the calibration curve.
        max_segments: Number of segments that are reported, the largest ones.
        chunk_rows: Rows in memory at once while computing.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        segments: bool = False,
        calibration_bins: int = 20,
        max_segments: int = 20,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        self._scores = KeyFile(directory)
        self._segments = KeyFile(directory) if segments else None
        self._calibration_bins, self._max_segments, self._chunk_rows = calibration_bins, max_segments, chunk_rows

    def __enter__(self) -> BinaryMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._scores)

    def close(self) -> None:
        """Delete the temporary files."""
        self._scores.close()
        if self._segments is not None:
            self._segments.close()

    def update(
        self,
        logits: Tensor | NDArray[Any],
        labels: Tensor | NDArray[Any],
        segments: Tensor | NDArray[Any] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            logits: [batch]; infinite ones are allowed.
            labels: [batch], 0 or 1.
            segments: [batch] ids in [0, 2**31), for a collector with segments.

        Raises:
            DivergedError: For NaN logits; nothing of the batch is kept.
            ValueError: For other shapes, other labels or segments; nothing of the batch is kept.
            OSError: If the disk is full.
        """
        if (segments is not None) != (self._segments is not None):
            raise ValueError("expected segments in every batch of a BinaryMetrics(segments=True), and in no batch else")
        scores, clicks = _vector(logits, "logits"), _vector(labels, "labels", len(logits))
        expected = "a number (the model has diverged: lower --dense.learning-rate)"
        _check(~np.isnan(scores), scores, "logits", expected, DivergedError)
        _check((clicks == 0) | (clicks == 1), clicks, "labels", "0 or 1")
        keys = pack_keys(scores, clicks)
        if segments is not None and self._segments is not None:
            ids = _vector(segments, "segments", len(logits))
            _check((ids >= 0) & (ids <= MAX_SEGMENT), ids, "segments", "an id in [0, 2**31) (--evaluation.segment-by)")
            self._segments.append(pack_keys(scores, clicks, ids))
        self._scores.append(keys)

    def merge(self, other: BinaryMetrics) -> None:
        """Add all that another collector has seen."""
        if (self._segments is None) != (other._segments is None):
            raise ValueError("expected both collectors with segments or both without, got one of each")
        self._scores.extend(other._scores)
        if self._segments is not None and other._segments is not None:
            self._segments.extend(other._segments)

    def key_files(self) -> list[KeyFile]:
        """Return what has been seen: scores with labels, and with segments, if it has them, once more."""
        return [self._scores] if self._segments is None else [self._scores, self._segments]

    def compute(self) -> MetricValues:
        """Return the metrics of all rows so far; more may be added afterwards.

        Raises:
            ValueError: If there are no rows.
        """
        if not len(self):
            raise ValueError("expected at least one row to evaluate, got none")
        keys = self._scores.sort()
        curve, sums, total = CalibrationCurve(len(keys), self._calibration_bins), _Sums(), RankSum(0, 0, 0, 0, 0.0)
        for groups in tie_groups(keys, self._chunk_rows):
            curve.add(groups)
            sums.add(groups)
            total = total.then(rank_sums(groups)[0])
        segments: list[RankSum] = []
        if self._segments is not None:
            segments = largest_segments(self._segments.sort(), self._max_segments, self._chunk_rows)
        rate, mean = total.positives / len(keys), total.prediction_sum / len(keys)
        logloss = sums.loss / len(keys)
        one_class = total.positives in (0, len(keys))
        variance = sums.deviation_square / len(keys) - (sums.deviation / len(keys)) ** 2
        return MetricValues(
            samples=len(keys),
            positives=total.positives,
            auc=total.auc,
            logloss=logloss,
            normalized_entropy=math.nan if one_class else logloss / _entropy(rate),
            calibration=mean / rate if rate else math.nan,
            mean_prediction=mean,
            prediction_std=math.sqrt(max(0.0, variance)),
            undefined=f"all {len(keys)} labels are {total.positives and 1}, AUC needs both" if one_class else None,
            calibration_curve=curve.bins(),
            segments=tuple(_describe(segment) for segment in segments),
        )


def relative_auc(auc: float, bayes_auc: float) -> float:
    """Return which share of the reachable AUC above .5 was reached: (auc - .5) / (bayes_auc - .5).

    Raises:
        ValueError: If no more than .5 can be reached.
    """
    if not bayes_auc > 0.5:
        raise ValueError(f"expected a best possible AUC above .5, got {bayes_auc}")
    return (auc - 0.5) / (bayes_auc - 0.5)


class _Sums:
    """Sums over rows, group by group."""

    def __init__(self) -> None:
        self.loss = self.deviation = self.deviation_square = 0.0
        self._lowest: float | None = None

    def add(self, groups: TieGroups) -> None:
        counts, probabilities = groups.counts, groups.probabilities
        self.loss += float(np.sum(_losses(groups)))
        # Around the lowest prediction, so that equal predictions have a spread of 0 exactly.
        self._lowest = float(probabilities[0]) if self._lowest is None else self._lowest
        deviations = probabilities - self._lowest
        self.deviation += float(np.sum(deviations * counts))
        self.deviation_square += float(np.sum(deviations**2 * counts))


def _losses(groups: TieGroups) -> NDArray[np.float64]:
    """Return each group's summed cross-entropy, max(-+score, 0) + log(1 + exp(-|score|)) per row, without 0 * inf."""
    tail = np.log1p(np.exp(-np.abs(groups.scores)))
    of_positive, of_negative = np.maximum(-groups.scores, 0.0) + tail, np.maximum(groups.scores, 0.0) + tail
    losses = np.zeros_like(tail)
    np.multiply(of_positive, groups.positives, out=losses, where=groups.positives > 0)
    return losses + np.where(groups.negatives > 0, of_negative, 0.0) * groups.negatives


def _entropy(rate: float) -> float:
    return -rate * math.log(rate) - (1.0 - rate) * math.log1p(-rate)


def _describe(segment: RankSum) -> SegmentValues:
    calibration = segment.prediction_sum / segment.positives if segment.positives else math.nan
    return SegmentValues(
        segment=segment.segment,
        samples=segment.samples,
        positives=segment.positives,
        auc=segment.auc,
        calibration=calibration,
        mean_prediction=segment.prediction_sum / segment.samples,
    )


def _vector(values: Tensor | NDArray[Any], name: str, length: int | None = None) -> NDArray[Any]:
    """Return a tensor or array as an array [length]."""
    if not isinstance(values, np.ndarray):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    if values.ndim != 1 or (length is not None and len(values) != length):
        expected = "[batch]" if length is None else f"[{length}], as of the logits"
        raise ValueError(f"{name}: expected the shape {expected}, got {list(values.shape)}")
    return values


def _check(
    holds: NDArray[np.bool_], values: NDArray[Any], name: str, expected: str, error: type[ValueError] = ValueError
) -> None:
    if not holds.all():
        row = int(np.argmin(holds))
        raise error(f"{name}: expected {expected}, got {values[row]} at row {row} of this batch")


def is_at_chance(auc: float | None, positives: int, samples: int) -> bool:
    """Whether an AUC cannot be told from .5: it lies within three standard errors of it.

    The variance under chance is (P + N + 1) / (12 P N) for P positives and N negatives (Mann and Whitney 1947).
    """
    negatives = samples - positives
    if auc is None or math.isnan(auc) or not positives or not negatives:
        return False
    return abs(auc - 0.5) < CHANCE_STANDARD_ERRORS * math.sqrt((samples + 1) / (12 * positives * negatives))

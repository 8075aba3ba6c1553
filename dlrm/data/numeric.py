"""Numeric transforms: statistics of chunks of the training part, put together, and applied to every part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlrm.data.dataset import Array, IntArray
from dlrm.data.exact_sum import Moments, measure
from dlrm.data.schema import FIRST_ID_ROW, MISSING_ROW, NumericColumn

SAMPLE_ROWS = 100_000  # of the training part, for quantiles
KNOTS = 1_001  # quantiles that are kept


@dataclass(frozen=True, kw_only=True)
class FittedTransform:
    """A numeric column's transform with all that was fitted.

    Attributes:
        name: of the column.
        transform: see `NumericColumn`.
        mean: of the training values, after the logarithm if there is one.
        deviation: their standard deviation; 1 for a constant.
        knots: quantile only: distinct quantiles of the training values, ascending.
        ranks: quantile only: the rank of each knot, in [0, 1].
        missing_indicator: whether a second column says where the value is absent.
        edges: between buckets, ascending; without them there are no buckets.
        count: training values that are there.
    """

    name: str
    transform: str
    count: int
    mean: float = 0.0
    deviation: float = 1.0
    knots: tuple[float, ...] = ()
    ranks: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    missing_indicator: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns that `apply` returns."""
        return (self.name, f"{self.name}:missing") if self.missing_indicator else (self.name,)

    def apply(self, numbers: Array) -> list[Array]:
        """Return the column, and its indicator if it has one, as float32; absent numbers become 0."""
        absent = np.isnan(numbers)
        out = take_logarithm(self.transform, numbers.astype(np.float64))
        if self.transform == "quantile":
            out = np.interp(out, self.knots, self.ranks)
        elif "standardise" in self.transform:
            out = (out - self.mean) / self.deviation
        columns = [np.where(absent, 0.0, out).astype(np.float32)]
        return [*columns, absent.astype(np.float32)] if self.missing_indicator else columns

    @property
    def bucket_rows(self) -> int:
        """The rows of the table on the column's buckets; 0 if it has none."""
        return FIRST_ID_ROW + len(self.edges) + 1 if self.edges else 0

    def find_buckets(self, numbers: Array) -> IntArray:
        """Return each number's row in the table on buckets, as int32."""
        buckets = FIRST_ID_ROW + np.searchsorted(self.edges, numbers, side="right")
        return np.where(np.isnan(numbers), MISSING_ROW, buckets).astype(np.int32)


def take_logarithm(transform: str, numbers: Array) -> Array:
    """Return sign(x) * log(1 + |x|) if the transform begins with it, else the numbers."""
    if not transform.startswith("log1p"):
        return numbers
    return np.asarray(np.sign(numbers) * np.log1p(np.abs(numbers)))


def measure_column(column: NumericColumn, numbers: Array) -> Moments:
    """Return the moments of a column's numbers after its logarithm, or if that will do their count alone."""
    numbers = numbers[~np.isnan(numbers)].astype(np.float64)
    if "standardise" not in column.transform:
        return Moments(count=len(numbers))
    return measure(take_logarithm(column.transform, numbers))


def sample_rows(first_row: int, rows: int, training_rows: int) -> IntArray:
    """Return which of `rows` rows belong to the sample of the training part: a pure function of their numbers."""
    if training_rows <= SAMPLE_ROWS:
        return np.arange(rows)
    mixed = np.arange(first_row, first_row + rows, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.flatnonzero(mixed < np.uint64(SAMPLE_ROWS / training_rows * 2**64))


def fit_transform(column: NumericColumn, moments: Moments, sample: Array) -> FittedTransform:
    """Fit a column's transform to the moments, or for quantiles to a sample, of the training part."""
    knots: Array = np.zeros(1)
    ranks: Array = np.zeros(1)
    if column.transform == "quantile":
        knots, ranks = _fit_quantiles(np.sort(sample))
    scaled = "standardise" in column.transform
    return FittedTransform(
        name=column.name,
        transform=column.transform,
        count=moments.count,
        mean=moments.mean if scaled else 0.0,
        deviation=(moments.deviation or 1.0) if scaled else 1.0,
        knots=tuple(knots.tolist()) if column.transform == "quantile" else (),
        ranks=tuple(ranks.tolist()) if column.transform == "quantile" else (),
        edges=_find_edges(sample, column.buckets),
        missing_indicator=column.missing_indicator,
    )


def _find_edges(sample: Array, buckets: int) -> tuple[float, ...]:
    """Return what lies between buckets of equally many values; a value that fills several has one of its own."""
    if not buckets:
        return ()
    quantiles = np.quantile(sample, np.arange(1, buckets) / buckets, method="higher")
    return tuple(np.unique(quantiles[quantiles > sample.min()]).tolist())


def _fit_quantiles(ordered: Array) -> tuple[Array, Array]:
    """Return knots and their ranks; equal numbers share the rank in their middle."""
    places = np.linspace(0, len(ordered) - 1, min(KNOTS, len(ordered))).round().astype(np.int64)
    knots = np.unique(ordered[places])
    below, above = np.searchsorted(ordered, knots, side="left"), np.searchsorted(ordered, knots, side="right")
    return knots, (below + above - 1) / 2 / max(len(ordered) - 1, 1)

"""Sums of floats without any rounding: they do not depend on how the rows were cut into chunks, to the last bit.

Statistics of the training part must not change when other rows of the source do, and those move the cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from dlrm.data.dataset import Array

HALF_BITS = 27  # a float64 has 53 bits: two halves, of each of which 2^26 fit into a float64 without rounding
UNIT_EXPONENT = -1200  # below the last bit of any float64
SPLITTER = float((1 << HALF_BITS) + 1)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, sum and sum of squares of numbers, exact: in units of 2^-1200."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            count=self.count + other.count, total=self.total + other.total, squares=self.squares + other.squares
        )

    def to_json(self) -> dict[str, int | str]:
        """Return the moments for a JSON file, which holds no integers of this size."""
        return {"count": self.count, "total": hex(self.total), "squares": hex(self.squares)}

    @staticmethod
    def from_json(facts: dict[str, Any]) -> Moments:
        """Return the moments that `to_json` wrote."""
        return Moments(count=facts["count"], total=int(facts["total"], 16), squares=int(facts["squares"], 16))

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 of no numbers."""
        return float(Fraction(self.total, self.count << -UNIT_EXPONENT)) if self.count else 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 0 of no numbers."""
        if not self.count:
            return 0.0
        mean = Fraction(self.total, self.count << -UNIT_EXPONENT)
        variance = Fraction(self.squares, self.count << -UNIT_EXPONENT) - mean * mean
        return float(np.sqrt(float(max(variance, Fraction(0)))))


def measure(numbers: Array) -> Moments:
    """Return the moments of float64 numbers, all of them finite."""
    high, low = _square(numbers)
    return Moments(count=len(numbers), total=sum_exactly(numbers), squares=sum_exactly(high) + sum_exactly(low))


def sum_exactly(numbers: Array) -> int:
    """Return the sum of float64 numbers in units of 2^-1200: integer mantissas are added up for each exponent."""
    mantissas, exponents = np.frexp(numbers)
    upper = np.floor(np.ldexp(mantissas, HALF_BITS))
    lower = np.ldexp(np.ldexp(mantissas, HALF_BITS) - upper, HALF_BITS)
    first = int(exponents.min(initial=0))
    total = 0
    for half, bits in ((upper, HALF_BITS), (lower, 2 * HALF_BITS)):
        sums = np.bincount(exponents - first, weights=half)
        total += sum(
            int(sums[place]) << (int(place) + first - bits - UNIT_EXPONENT) for place in np.flatnonzero(sums).tolist()
        )
    return total


def _square(numbers: Array) -> tuple[Array, Array]:
    """Return high + low = numbers ** 2 without rounding (Dekker 1971), unless the square leaves float64's range."""
    high = numbers * numbers
    upper = SPLITTER * numbers
    upper = upper - (upper - numbers)
    lower = numbers - upper
    return high, ((upper * upper - high) + 2 * upper * lower) + lower * lower

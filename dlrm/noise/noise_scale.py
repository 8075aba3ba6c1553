"""The gradient noise scale: how many samples it takes until a batch's gradient is more signal than noise.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162: with G the gradient of the
expected loss and Sigma the covariance of one sample's gradient, the simple noise scale is tr(Sigma) / |G|^2. Both parts
are estimated without bias from norms at two batch sizes, and smoothed apart: a mean of ratios is biased, and a single
estimate of |G|^2 may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class NoiseEstimate(NamedTuple):
    """Unbiased estimates of |G|^2 and of tr(Sigma) from one step; the first may be negative."""

    squared_norm: float
    variance: float


def estimate_from_two(small: float, large: float, small_norm: float, large_norm: float) -> NoiseEstimate:
    """Estimate both from squared norms of gradients of mean losses at two batch sizes (arXiv:1812.06162, app. A.1).

    Args:
        small: samples of the smaller batch.
        large: samples of the larger one.
        small_norm: mean squared norm of the gradients of smaller batches.
        large_norm: squared norm of the gradient of the larger one.
    """
    squared_norm = (large * large_norm - small * small_norm) / (large - small)
    return NoiseEstimate(squared_norm, (small_norm - large_norm) / (1.0 / small - 1.0 / large))


class GradientSums(NamedTuple):
    """What is summed over the samples of a step, and over ranks, for one group of parameters.

    With g_i the gradient of sample i's own loss. A product of two different samples' gradients has the mean |G|^2, so
    that |G|^2 can be had from whichever products are at hand: those of all samples of a step, or of the samples of each
    rank among themselves, where no rank has the sum of all.

    Attributes:
        samples: whose squares were summed.
        pairs: ordered pairs of different samples within the sums whose squares were summed.
        squares: sum over samples of |g_i|^2.
        squared_sums: sum over ranks of |sum_i g_i|^2, or the square of the sum over all.
    """

    samples: float
    pairs: float
    squares: float
    squared_sums: float

    def estimate(self) -> NoiseEstimate | None:
        """Return the estimates, which for one sum over all samples are those of `estimate_from_two(1, samples)`.

        None where there is no pair, or a number is not finite.
        """
        if self.pairs < 1 or not math.isfinite(self.squares + self.squared_sums):
            return None
        squared_norm = (self.squared_sums - self.squares) / self.pairs
        return NoiseEstimate(squared_norm, self.squares / self.samples - squared_norm)


@dataclass
class Smoothed:
    """An exponential moving average that is not drawn towards the 0 it begins with.

    Attributes:
        total: sum of decayed values.
        weight: sum of decayed ones; the average is `total / weight`.
        squares: sum of the decayed values' squares.
        squared_weights: sum of the squares of what the weights consist of.
    """

    total: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    squared_weights: float = 0.0

    def add(self, value: float, decay: float) -> None:
        """Take in a value."""
        self.total = decay * self.total + (1.0 - decay) * value
        self.weight = decay * self.weight + (1.0 - decay)
        self.squares = decay * self.squares + (1.0 - decay) * value**2
        self.squared_weights = decay**2 * self.squared_weights + (1.0 - decay) ** 2

    @property
    def mean(self) -> float | None:
        """The average so far, None before the first value."""
        return self.total / self.weight if self.weight else None

    @property
    def standard_error(self) -> float:
        """Of the average, as far as values are independent; infinite before the second one."""
        share = self.squared_weights / self.weight**2 if self.weight else 1.0  # 1 / values that count
        if share >= 1.0:
            return math.inf
        spread = self.squares / self.weight - (self.total / self.weight) ** 2
        return math.sqrt(max(spread, 0.0) * share / (1.0 - share))


class GradientNoiseScale:
    """Follows |G|^2 and tr(Sigma) of one group of parameters through a run.

    Args:
        decay: of both averages, per measurement.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.95) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self._norm, self._variance = Smoothed(), Smoothed()
        self.measurements = 0

    def add(self, estimate: NoiseEstimate | None) -> None:
        """Take in a step's estimates; none, or one that is not finite, is passed over."""
        if estimate is None or not all(map(math.isfinite, estimate)):
            return
        self._norm.add(estimate.squared_norm, self.decay)
        self._variance.add(estimate.variance, self.decay)
        self.measurements += 1

    @property
    def squared_norm(self) -> float | None:
        """The smoothed |G|^2, which may be negative; None before the first measurement."""
        return self._norm.mean

    @property
    def variance(self) -> float | None:
        """The smoothed tr(Sigma); None before the first measurement."""
        return self._variance.mean

    @property
    def value(self) -> float | None:
        """The noise scale in samples; None while |G|^2 cannot be told from 0."""
        squared_norm, variance = self.squared_norm, self.variance
        if squared_norm is None or variance is None or squared_norm <= 0.0:
            return None
        return max(variance, 0.0) / squared_norm

    def state(self) -> dict[str, Any]:
        """Return what `load_state` goes on from."""
        return {
            "squared_norm": asdict(self._norm),
            "variance": asdict(self._variance),
            "measurements": self.measurements,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._norm, self._variance = Smoothed(**state["squared_norm"]), Smoothed(**state["variance"])
        self.measurements = int(state["measurements"])

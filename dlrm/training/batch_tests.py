"""Tests of whether a batch is large enough for its gradient, which say how large it would have to be.

The norm test: the batch's gradient errs by less than eta of its length, Var(g_i) / B <= eta^2 |G|^2 (Byrd et al. 2012).
The inner-product test: it is a descent direction as reliably, Var(<g_i, g>) / B <= theta^2 |G|^4; the augmented test
also bounds what lies across it, Var(g_i - <g_i, g> g / |g|^2) / B <= nu^2 |G|^2 (Bollapragada et al. 2018,
arXiv:1710.11258). AdAdaGrad (Lau et al. 2024, arXiv:2402.11215) grows batches by them.

All gradients are those of the dense part as one vector. |G|^2 is the unbiased estimate: of the batch's own squared
norm, the variance is a part, and a tolerance of 1 would let every batch pass. All moments are smoothed apart. As no
batch gets smaller again, it grows only as far as is sure: |G|^2 is taken `STANDARD_ERRORS` above its estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from dlrm.noise.gradient_meter import DENSE, Measured, ProductSums
from dlrm.noise.noise_scale import Smoothed
from dlrm.training.batch_growth_config import BatchGrowthConfig

STANDARD_ERRORS = 1.0


@dataclass
class Moments:
    """What the tests ask of the samples' dense gradients g_i with mean g, smoothed over measured steps.

    Attributes:
        squared_norm: |G|^2 of the expected gradient.
        variance: tr(Sigma) of one sample's gradient.
        along: variance of <g_i, g>.
        across: variance of g_i - <g_i, g> g / |g|^2.
        measurements: so far.
        at_this_size: of them, since the batch has changed.
    """

    squared_norm: Smoothed = field(default_factory=Smoothed)
    variance: Smoothed = field(default_factory=Smoothed)
    along: Smoothed = field(default_factory=Smoothed)
    across: Smoothed = field(default_factory=Smoothed)
    measurements: int = 0
    at_this_size: int = 0

    def note_change(self) -> None:
        """Forget what goes with the batch size: variances along and across the batch's own gradient."""
        self.along, self.across, self.at_this_size = Smoothed(), Smoothed(), 0

    def add(self, measured: Measured, decay: float) -> None:
        """Take in a step; one of which something is not known is passed over."""
        estimate = measured.groups[DENSE].estimate() if DENSE in measured.groups else None
        parts = (0.0, 0.0) if measured.products is None else split_variance(measured.products)
        if estimate is None or not all(map(math.isfinite, (*estimate, *parts))):
            return
        names = ("squared_norm", "variance", "along", "across")
        for name, value in zip(names, (*estimate, *parts), strict=True):
            getattr(self, name).add(value, decay)
        self.measurements += 1
        self.at_this_size += 1

    def state(self) -> dict[str, object]:
        """Return what `load_state` goes on from."""
        return asdict(self)

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on from what `state` returned."""
        for name, value in state.items():
            setattr(self, name, Smoothed(**value) if isinstance(value, Mapping) else value)


def split_variance(sums: ProductSums) -> tuple[float, float]:
    """Return the samples' variances along and across their mean g: of <g_i, g>, and of what is orthogonal to g."""
    degrees = sums.samples - 1.0
    if degrees < 1.0 or not sums.squared_norm > 0.0:
        return math.nan, math.nan
    along = (sums.squared_products - sums.products**2 / sums.samples) / degrees
    return max(along, 0.0), max((sums.squares - sums.squared_products / sums.squared_norm) / degrees, 0.0)


def propose_size(moments: Moments, config: BatchGrowthConfig) -> float | None:
    """Return the smallest batch that passes the configured test; None where it is not known, or no batch would.

    Args:
        moments: measured so far.
        config: which test, and what it tolerates.
    """
    norm, variance = moments.squared_norm.mean, moments.variance.mean
    if norm is None or variance is None or norm <= 0.0:
        return None
    norm += STANDARD_ERRORS * moments.squared_norm.standard_error
    if config.test == "norm":
        return max(variance, 0.0) / (config.norm_tolerance**2 * norm)
    if not moments.at_this_size:
        return None
    size = (moments.along.mean or 0.0) / (config.inner_product_tolerance**2 * norm**2)
    if config.test == "augmented":
        size = max(size, (moments.across.mean or 0.0) / (config.orthogonality_tolerance**2 * norm))
    return size


def is_known_well(moments: Moments, config: BatchGrowthConfig) -> bool:
    """Whether enough steps have been measured for a change."""
    known = moments.measurements if config.test == "norm" else moments.at_this_size
    return known >= config.first_measurements

"""Batches that grow as was said before the run began, as a function of samples seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Stages = list[tuple[int, int]]
"""(from sample, size), ascending; the first begins at 0."""

ROUNDING = 1e-9  # of a schedule's factors


class RateAndSize(NamedTuple):
    """What a step takes: a factor on the learning rate, and so many samples."""

    factor: float
    batch_size: int


class NoiseScaleSchedule:
    """Grows the batch instead of lowering the learning rate, and lowers it once the batch is as large as it may be.

    The noise of SGD depends on g = rate * N / batch size, N training samples (Smith et al. 2018, arXiv:1711.00489), so
    that a batch k times as large does what a rate k times as small would, in k times fewer updates. The batch takes
    sizes that are `ratio` times one another, and the rate makes up for what lies between: g is at every sample that of
    the schedule with the first batch size.

    Args:
        factor: the schedule: what multiplies the rate once so many samples have been seen. Where it has come down from
            its highest value so far, batches grow.
        first: batch size to which the schedule belongs.
        largest: batch size.
        ratio: of one batch size to the next.
        round_to: batch sizes are multiples of it, but the first.
        total: samples of the run.
    """

    def __init__(
        self,
        factor: Callable[[float], float],
        *,
        first: int,
        largest: int,
        total: int,
        ratio: float = 2.0,
        round_to: int = 1,
    ) -> None:
        self.factor, self.first, self.total = factor, first, total
        self.stages = self._plan(largest, ratio, round_to)

    def at(self, samples: float) -> RateAndSize:
        """Return what a step takes after so many samples."""
        size = next(size for begin, size in reversed(self.stages) if begin <= samples)
        return RateAndSize(self.factor(samples) * size / self.first, size)

    def noise(self, samples: float) -> float:
        """Return g over its value with a rate factor of 1 and the first batch size."""
        rate, size = self.at(samples)
        return rate * self.first / size

    def count_updates(self) -> float:
        """Return how many steps the run takes; cut steps at the ends of stages count as parts."""
        ends = [begin for begin, _ in self.stages[1:]] + [self.total]
        return sum((end - begin) / size for (begin, size), end in zip(self.stages, ends, strict=True))

    def _plan(self, largest: int, ratio: float, round_to: int) -> Stages:
        stages, peak, samples = [(0, self.first)], 0.0, 0
        while samples < self.total:
            now, size = self.factor(samples), stages[-1][1]
            peak = max(peak, now)
            wished = min(round(size * ratio) // round_to * round_to, largest // round_to * round_to)
            # Not before the rate has come down as far as the batch gets larger: it never exceeds its peak.
            if wished > size and now < peak and now * wished <= peak * self.first * (1.0 + ROUNDING):
                stages.append((samples, wished))
                continue
            samples += size
        return stages

"""Batches that grow instead of a rate that falls: the same noise at every sample, in fewer updates."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.optim.lr_schedules import Schedule
from dlrm.training.batch_schedules import NoiseScaleSchedule

FIRST, TOTAL = 64, 1_000_000


def fall_in_steps(samples: float) -> float:
    """A fifth after 40 % of the run, and a fifth of that after 70 %."""
    return 0.2 ** (int(samples >= 0.4 * TOTAL) + int(samples >= 0.7 * TOTAL))


@pytest.mark.parametrize("largest", [64, 1000, 2000, 100_000])
@pytest.mark.parametrize(
    "factor",
    [fall_in_steps, Schedule(warmup_samples=50_000, decay_samples=900_000, decay_power=2.0, end_factor=0.01).factor],
)
def test_the_noise_is_that_of_the_falling_rate(factor, largest: int) -> None:
    schedule = NoiseScaleSchedule(factor, first=FIRST, largest=largest, total=TOTAL, round_to=8)
    for samples in np.linspace(0, TOTAL - 1, 997):
        assert schedule.noise(samples) == pytest.approx(factor(samples), rel=1e-12)
        rate, size = schedule.at(samples)
        assert FIRST <= size <= largest
        assert size % 8 == 0
        assert rate <= 1.0 + 1e-9
    sizes = [size for _, size in schedule.stages]
    assert sizes == sorted(set(sizes))
    assert (sizes[-1] > FIRST) == (largest > FIRST)


def test_fewer_updates_as_predicted() -> None:
    schedule = NoiseScaleSchedule(fall_in_steps, first=FIRST, largest=100_000, total=TOTAL, ratio=5.0)
    assert [size for _, size in schedule.stages] == [FIRST, 5 * FIRST, 25 * FIRST]
    # 40 % of the samples at the first size, 30 % at five times, 30 % at twenty-five times.
    ratio = schedule.count_updates() / (TOTAL / FIRST)
    assert ratio == pytest.approx(0.4 + 0.3 / 5 + 0.3 / 25, rel=1e-3)
    taken, samples = 0, 0
    while samples < TOTAL:
        samples += schedule.at(samples).batch_size
        taken += 1
    assert taken == pytest.approx(schedule.count_updates(), abs=3)


def test_both_ways_wander_as_far_on_the_quadratic() -> None:
    """SGD on 0.5 h w^2 with gradient noise ends at the variance eta * sigma^2 / (2 B) for small eta h."""
    curvature, rate, spread, chains = 1.0, 0.02, 3.0, 20_000
    schedule = NoiseScaleSchedule(lambda samples: 1.0 if samples < 1 else 0.25, first=8, largest=1000, total=100_000)
    decayed, grown = (rate * 0.25, 8), (rate * schedule.at(50_000).factor, schedule.at(50_000).batch_size)
    assert grown == (pytest.approx(rate), 32)
    variances = []
    for eta, size in (decayed, grown):
        random, w = np.random.default_rng(0), np.zeros(chains)
        for _ in range(round(4 / (eta * curvature))):
            w -= eta * (curvature * w + random.normal(scale=spread / np.sqrt(size), size=chains))
        variances.append(w.var())
    assert variances[1] == pytest.approx(variances[0], rel=0.05)
    assert variances[0] == pytest.approx(rate * 0.25 * spread**2 / (2 * 8), rel=0.05)

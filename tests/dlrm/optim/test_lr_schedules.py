"""Schedules at the samples where something changes, and the promises that hold everywhere between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.optim.lr_schedules import Schedule

FULL = Schedule(
    warmup_samples=100, hold_samples=50, decay_samples=200, decay_power=2.0, start_factor=0.2, end_factor=0.1
)


@pytest.mark.parametrize(
    ("samples", "factor"),
    [
        (0, 0.2),
        (25, 0.4),
        (50, 0.6),
        (99.5, 0.996),
        (100, 1.0),
        (149, 1.0),
        (150, 1.0),
        (200, 0.1 + 0.9 * 0.75**2),
        (250, 0.1 + 0.9 * 0.25),
        (350, 0.1),
        (10**12, 0.1),
    ],
)
def test_each_part_has_its_shape(samples: float, factor: float) -> None:
    assert FULL.factor(samples) == pytest.approx(factor, rel=1e-12)


def test_the_default_is_constant() -> None:
    assert [Schedule().factor(samples) for samples in (0, 1, 10**9)] == [1.0, 1.0, 1.0]


def test_without_decay_the_end_factor_is_never_reached() -> None:
    schedule = Schedule(warmup_samples=10, end_factor=0.5)
    assert [schedule.factor(samples) for samples in (5, 10, 10**9)] == [0.5, 1.0, 1.0]


def test_without_warmup_decay_starts_at_one() -> None:
    schedule = Schedule(decay_samples=10)
    assert [schedule.factor(samples) for samples in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_in_the_middle_of_batches_no_step_is_lost() -> None:
    schedule = Schedule(warmup_samples=64, decay_samples=64)
    factors = [schedule.factor(start + 16) for start in range(0, 128, 32)]
    assert factors == [0.25, 0.75, 0.75, 0.25]


@given(
    lengths=st.tuples(*[st.integers(0, 1000)] * 3),
    ends=st.tuples(*[st.floats(0, 1)] * 2),
    power=st.floats(0.5, 4),
    samples=st.lists(st.integers(0, 5000), min_size=2),
)
def test_rises_then_falls_between_its_bounds(
    lengths: tuple[int, int, int], ends: tuple[float, float], power: float, samples: list[int]
) -> None:
    warmup, hold, decay = lengths
    schedule = Schedule(
        warmup_samples=warmup,
        hold_samples=hold,
        decay_samples=decay,
        decay_power=power,
        start_factor=ends[0],
        end_factor=ends[1],
    )
    rising = [schedule.factor(s) for s in sorted(samples) if s <= warmup + hold]
    falling = [schedule.factor(s) for s in sorted(samples) if s >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(min(*ends) <= factor <= 1.0 for factor in rising + falling)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"warmup_samples": -1}, "warmup-samples"),
        ({"hold_samples": -1}, "hold-samples"),
        ({"decay_samples": -5}, "decay-samples"),
        ({"decay_power": 0.0}, "decay-power"),
        ({"start_factor": -0.1}, "start-factor"),
        ({"end_factor": float("nan")}, "end-factor"),
    ],
)
def test_nonsense_names_its_flags(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"--dense-schedule.{flag} / --tables-schedule.{flag}: expected .*, got"):
        Schedule(**options)

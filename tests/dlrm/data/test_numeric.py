"""Statistics are exact and independent of how rows are cut into chunks; transforms do what their names say."""

from __future__ import annotations

import json
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm.data import numeric
from dlrm.data.exact_sum import UNIT_EXPONENT, Moments, measure, sum_exactly
from dlrm.data.numeric import FittedTransform, fit_transform, measure_column, sample_rows
from dlrm.data.schema import NumericColumn

floats = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=60)
moderate = st.lists(st.floats(-1e100, 1e100).filter(lambda x: x == 0 or abs(x) > 1e-100), min_size=1, max_size=60)


@given(floats)
def test_sums_are_exact(numbers: list[float]) -> None:
    total = sum_exactly(np.array(numbers, dtype=np.float64))
    assert Fraction(total, 1 << -UNIT_EXPONENT) == sum(map(Fraction, numbers), Fraction(0))


@settings(deadline=None)
@given(moderate, st.integers(0, 60))
def test_moments_are_exact_and_add_up(numbers: list[float], cut: int) -> None:
    whole = measure(np.array(numbers))
    parts = measure(np.array(numbers[cut:])) + measure(np.array(numbers[:cut]))
    assert parts == whole == Moments.from_json(json.loads(json.dumps(whole.to_json())))
    assert Fraction(whole.squares, 1 << -UNIT_EXPONENT) == sum((Fraction(x) ** 2 for x in numbers), Fraction(0))
    assert whole.mean == statistics.mean(numbers)
    assert whole.deviation == pytest.approx(float(statistics.pstdev(map(Fraction, numbers))), rel=1e-14)


def test_deviation_of_large_numbers() -> None:
    """Where mean and deviation lie ten digits apart, E[x^2] - E[x]^2 in floats would give nothing."""
    numbers = 1.7e9 + np.arange(1000) * 0.001
    assert measure(numbers).deviation == pytest.approx(np.std(np.arange(1000) * 0.001), rel=1e-6)


def fit(column: NumericColumn, numbers: np.ndarray) -> FittedTransform:
    return fit_transform(column, measure_column(column, numbers), numbers[~np.isnan(numbers)])


def test_constants_are_not_divided_by_zero() -> None:
    fitted = fit(NumericColumn(name="n", transform="standardise"), np.full(9, 7.0))
    assert fitted.apply(np.array([7.0, 8.0, np.nan]))[0].tolist() == [0.0, 1.0, 0.0]


def test_large_numbers_keep_their_differences() -> None:
    """A float32 cannot tell seconds of today apart, so standardising comes first."""
    numbers = 1_700_000_000 + np.arange(11.0)
    found = fit(NumericColumn(name="n", transform="standardise"), numbers).apply(numbers)[0]
    np.testing.assert_allclose(found, (np.arange(11) - 5) / np.sqrt(10), rtol=1e-6)


def test_logarithm_is_odd() -> None:
    fitted = fit(NumericColumn(name="n", transform="log1p"), np.arange(3.0))
    found = fitted.apply(np.array([-9.0, -0.0, 0.0, 9.0]))[0]
    np.testing.assert_allclose(found, [-np.log(10), 0, 0, np.log(10)], rtol=1e-6)


def test_quantiles_of_many_values() -> None:
    numbers = np.random.default_rng(0).lognormal(size=20_000)
    fitted = fit(NumericColumn(name="n", transform="quantile"), numbers)
    found = fitted.apply(np.sort(numbers))[0]
    np.testing.assert_allclose(found, np.linspace(0, 1, 20_000), atol=2e-3)
    assert fitted.apply(np.array([-1.0, 1e9, np.nan]))[0].tolist() == [0.0, 1.0, 0.0]
    assert len(fitted.knots) <= numeric.KNOTS


def test_quantiles_give_equal_values_the_rank_in_their_middle() -> None:
    numbers = np.array([0.0] * 60 + [1.0] * 20 + [5.0] * 20)
    fitted = fit(NumericColumn(name="n", transform="quantile"), numbers)
    np.testing.assert_allclose(fitted.apply(np.array([0.0, 1.0, 5.0]))[0], np.array([29.5, 69.5, 89.5]) / 99, rtol=1e-6)


def test_buckets_hold_equally_many_values() -> None:
    numbers = np.random.default_rng(0).normal(size=1000)
    fitted = fit(NumericColumn(name="n", buckets=10), numbers)
    assert fitted.bucket_rows == 12
    found = fitted.find_buckets(np.append(numbers, [np.nan, -99, 99]))
    assert found[-3:].tolist() == [1, 2, 11]
    assert np.bincount(found[:-3], minlength=12).tolist() == [0, 0] + [100] * 10


def test_the_sample_is_a_function_of_the_row_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numeric, "SAMPLE_ROWS", 2000)
    whole = sample_rows(0, 100_000, 100_000)
    assert 1800 < len(whole) < 2200
    pieces = [first + sample_rows(first, 999, 100_000) for first in range(0, 100_000, 999)]
    flat = np.concatenate(pieces)
    assert flat[flat < 100_000].tolist() == whole.tolist()
    np.testing.assert_allclose(np.quantile(whole, [0.25, 0.5, 0.75]), [25_000, 50_000, 75_000], rtol=0.06)
    assert sample_rows(7, 5, 2000).tolist() == [0, 1, 2, 3, 4]

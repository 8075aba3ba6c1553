"""The noise scale of a problem whose noise scale is known, and why numerator and denominator are smoothed apart."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.noise.noise_scale import GradientNoiseScale, GradientSums, NoiseEstimate, estimate_from_two

DIM, BATCH, STEPS = 8, 16, 6000


@pytest.fixture(scope="module")
def quadratic() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples' gradients H (w - c_i) [STEPS, BATCH, DIM] of 0.5 (w - c)' H (w - c), their mean, their covariance."""
    random = np.random.default_rng(1)
    hessian, spread = np.linspace(0.5, 2.0, DIM), np.linspace(1.0, 3.0, DIM)
    mean = hessian * random.normal(size=DIM)
    noise = hessian * np.sqrt(spread) * random.normal(size=(STEPS, BATCH, DIM))
    return mean - noise, mean, np.diag(hessian**2 * spread)


def sums_of(gradients: np.ndarray, metric: np.ndarray | float = 1.0) -> GradientSums:
    count = len(gradients)
    return GradientSums(
        count, count * (count - 1.0), (metric * gradients**2).sum(), (metric * gradients.sum(axis=0) ** 2).sum()
    )


def test_quadratic(quadratic) -> None:
    gradients, mean, covariance = quadratic
    scale, ratios = GradientNoiseScale(decay=0.9999), []
    for step in gradients:
        estimate = sums_of(step).estimate()
        scale.add(estimate)
        ratios.append(estimate.variance / estimate.squared_norm)
    expected = np.trace(covariance) / (mean @ mean)
    assert scale.value == pytest.approx(expected, rel=0.03)
    assert scale.squared_norm == pytest.approx(mean @ mean, rel=0.03)
    # Of the same estimates: the mean of ratios is off by more than that, if it is a number of any use at all.
    assert abs(np.mean(ratios) - expected) > 0.05 * expected


def test_curvature_weighs_the_same_estimates(quadratic) -> None:
    gradients, mean, covariance = quadratic
    hessian = np.linspace(0.5, 2.0, DIM)
    scale = GradientNoiseScale(decay=0.9999)
    for step in gradients:
        scale.add(sums_of(step, hessian).estimate())
    assert scale.value == pytest.approx((hessian * np.diag(covariance)).sum() / (mean @ (hessian * mean)), rel=0.03)


def test_sums_over_all_samples_are_the_pair_of_batch_sizes(quadratic) -> None:
    step = quadratic[0][0]
    small = (step**2).sum(axis=1).mean()
    large = (step.mean(axis=0) ** 2).sum()
    assert sums_of(step).estimate() == pytest.approx(estimate_from_two(1, BATCH, small, large))
    # And the variance is the samples' own.
    assert sums_of(step).estimate().variance == pytest.approx(step.var(axis=0, ddof=1).sum())


def test_ranks_that_know_their_own_samples_only_are_unbiased(quadratic) -> None:
    gradients, mean, covariance = quadratic
    scale = GradientNoiseScale(decay=0.9999)
    for step in gradients:
        shares = [step[:3], step[3:9], step[9:]]
        parts = [sums_of(share) for share in shares]
        scale.add(GradientSums(*(sum(numbers) for numbers in zip(*parts, strict=True))).estimate())
    assert scale.value == pytest.approx(np.trace(covariance) / (mean @ mean), rel=0.03)


def test_unknown_while_the_gradient_is_not_told_from_noise() -> None:
    scale = GradientNoiseScale()
    assert scale.value is None
    scale.add(NoiseEstimate(-1.0, 2.0))
    assert scale.value is None
    assert scale.squared_norm == pytest.approx(-1.0)  # not drawn towards 0
    scale.add(NoiseEstimate(5.0, 2.0))
    assert scale.value == pytest.approx(2.0 / ((5.0 - 0.95) / 1.95))


def test_what_is_no_number_is_passed_over() -> None:
    scale = GradientNoiseScale()
    scale.add(NoiseEstimate(1.0, 3.0))
    for estimate in (None, NoiseEstimate(float("nan"), 1.0), NoiseEstimate(1.0, float("inf"))):
        scale.add(estimate)
    assert (scale.value, scale.measurements) == (pytest.approx(3.0), 1)
    assert GradientSums(4, 12, float("nan"), 1.0).estimate() is None
    assert GradientSums(1, 0, 1.0, 1.0).estimate() is None


def test_goes_on_where_it_was() -> None:
    first, second = GradientNoiseScale(), GradientNoiseScale()
    first.add(NoiseEstimate(1.0, 3.0))
    second.load_state(first.state())
    for scale in (first, second):
        scale.add(NoiseEstimate(2.0, 5.0))
    assert first.value == second.value
    assert second.state() == first.state()


def test_refuses_a_decay_that_forgets_nothing() -> None:
    with pytest.raises(ValueError, match="decay: expected"):
        GradientNoiseScale(1.0)

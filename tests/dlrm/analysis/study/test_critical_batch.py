"""The law of the critical batch against published runs, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.analysis.study.critical_batch import (
    DIMINISHING,
    MAXIMAL,
    PERFECT,
    explained_share,
    find_most_useful,
    fit_critical_batch,
    range_over_subsets,
)

# MLPerf training's reference convergence points (mlcommons/logging, rcp_checker: training_1.0.0 and training_3.0.0,
# Apache-2.0): global batch size -> mean epochs to AUC 0.8025 (DLRM v1, SGD) and 0.80275 (DLRM-DCNv2, Adagrad), of
# Criteo's terabyte log.
DLRM = {32_768: 1.755, 55_296: 1.902, 71_680: 1.998}
DCN = {32_768: 0.707, 55_296: 0.763, 65_536: 0.793, 102_400: 0.890, 135_168: 0.928, 160_000: 0.958}
EPOCH = 4_195_197_692


@pytest.mark.parametrize(
    ("points", "critical", "least_epochs", "least_steps", "largest_residual"),
    [(DLRM, 2.48e5, 1.552, 26.3e3, 0.004), (DCN, 3.29e5, 0.656, 8.4e3, 0.029)],
    ids=["dlrm", "dcn"],
)
def test_published_runs(
    points: dict[int, float], critical: float, least_epochs: float, least_steps: float, largest_residual: float
) -> None:
    epochs = list(points.values())
    fit = fit_critical_batch(list(points), [EPOCH * number for number in epochs])
    assert fit.critical_batch == pytest.approx(critical, rel=0.003)
    assert fit.least_samples / EPOCH == pytest.approx(least_epochs, rel=0.002)
    assert fit.least_steps == pytest.approx(least_steps, rel=0.01)
    assert max(map(abs, fit.residuals)) / EPOCH == pytest.approx(largest_residual, abs=0.0006)
    assert [fit.samples(batch) + rest for batch, rest in zip(points, fit.residuals, strict=True)] == pytest.approx(
        [EPOCH * number for number in epochs]
    )
    assert all(fit.region(batch) == DIMINISHING for batch in list(points)[1:])
    in_epochs = fit_critical_batch(list(points), epochs)
    assert in_epochs.critical_batch == pytest.approx(fit.critical_batch)


@pytest.mark.parametrize(("points", "critical", "apart"), [(DLRM, 2.48e5, 0.004), (DCN, 3.29e5, 0.033)])
def test_published_runs_as_a_page_fits_them(points: dict[int, float], critical: float, apart: float) -> None:
    fit = fit_critical_batch(list(points), list(points.values()), relative=True)
    assert fit.critical_batch == pytest.approx(critical, rel=apart)
    # Residuals as shares of what was measured are a plain problem: 1 = E_min / E + S_min B / E.
    batches, epochs = np.array(list(points.items())).T
    (least, slope), *_ = np.linalg.lstsq(np.stack([1 / epochs, batches / epochs], 1), np.ones(len(epochs)), rcond=None)
    assert fit.critical_batch == pytest.approx(least / slope)


@pytest.mark.parametrize("relative", [False, True])
def test_a_law_without_noise_comes_out(relative: bool) -> None:
    batches = [2**k for k in range(3, 20)]
    fit = fit_critical_batch(batches, [3e6 + 700.0 * batch for batch in batches], relative=relative)
    assert (fit.least_samples, fit.least_steps) == pytest.approx((3e6, 700.0))
    steps, samples = fit.steps(512), fit.samples(512)
    assert (steps / fit.least_steps - 1) * (samples / fit.least_samples - 1) == pytest.approx(1)
    assert fit.samples(fit.critical_batch) == pytest.approx(2 * fit.least_samples)
    assert fit.steps(fit.critical_batch) == pytest.approx(2 * fit.least_steps)
    assert fit.samples(fit.perfect_up_to) == pytest.approx(1.1 * fit.least_samples)
    assert fit.steps(fit.maximal_from) == pytest.approx(1.1 * fit.least_steps)
    regions = [fit.region(batch) for batch in (fit.perfect_up_to * 0.99, fit.critical_batch, fit.maximal_from * 1.01)]
    assert regions == [PERFECT, DIMINISHING, MAXIMAL]
    samples_of = [3e6 + 700.0 * batch for batch in batches]
    assert explained_share(fit, batches, samples_of) == pytest.approx(1)
    assert range_over_subsets(batches, samples_of, relative=relative) == pytest.approx((3e6 / 700, 3e6 / 700))


def test_relative_residuals_keep_small_batches_in_sight() -> None:
    noise = np.random.default_rng(0)
    batches = [2**k for k in range(4, 18)]
    errors = {False: [], True: []}
    for _ in range(200):
        measured = [(1e4 + 10.0 * batch) * np.exp(0.05 * noise.standard_normal()) for batch in batches]
        for relative, found in errors.items():
            try:
                found.append(abs(np.log(fit_critical_batch(batches, measured, relative=relative).critical_batch / 1e3)))
            except ValueError:
                found.append(np.inf)
    assert np.median(errors[True]) < 0.05 < np.median(errors[False])


@pytest.mark.parametrize(
    ("batches", "samples", "words"),
    [
        ([64], [100.0], "at least two batch sizes"),
        ([64, 128, 256], [100.0, 100.0, 90.0], "beyond the batches that were measured"),
        ([64, 128, 256], [64.0, 128.0, 300.0], "below the batches that were measured"),
    ],
)
def test_what_cannot_be_fitted_says_why(batches: list[int], samples: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_critical_batch(batches, samples)


def test_the_most_useful_batch_is_the_last_that_saves_steps() -> None:
    assert find_most_useful([64, 128, 256, 512], [1000, 520, 300, 290]) == 256
    assert find_most_useful([64, 128, 256, 512], [1000, 520, 300, 200]) == 512
    assert find_most_useful([64, 128, 256, 512], [1000, 990, 100, 50]) == 64
    assert find_most_useful([64], [1000]) == 64

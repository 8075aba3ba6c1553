"""The search for the fewest steps, on problems whose answer is known: a noisy quadratic, and one without noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dlrm.analysis.study.critical_batch import explained_share, fit_critical_batch
from dlrm.analysis.study.space import Dimension
from dlrm.analysis.study.steps_to_result import (
    Protocol,
    Request,
    find_crossing,
    steps_to_result,
)
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.diverged import DivergedError

DIM = 100
CURVATURE = np.geomspace(1, 0.02, DIM)
RATE = Dimension(name="rate", low=1e-3, high=1.9, ends=("high",))


def train_quadratic(request: Request) -> Iterator[tuple[float, float]]:
    """Descend 0.5 w'Hw with gradients Hw + noise of variance 1 / batch size, and say the loss every other step."""
    noise = np.random.default_rng([request.seed, request.batch_size])
    weights, samples = np.ones(DIM), 0
    while True:
        for _ in range(2):
            gradient = CURVATURE * weights + noise.standard_normal(DIM) / math.sqrt(request.batch_size)
            weights = weights - request.parameters["rate"] * gradient
            samples += request.batch_size
        yield samples, 0.5 * float(CURVATURE @ (weights * weights))


def test_steps_follow_the_law_and_the_critical_batch_is_the_noise_scale() -> None:
    goal = 0.3
    protocol = Protocol(goal=goal, higher_is_better=False, trials=16, repeats=5, most_samples=1e6)
    results = steps_to_result(train_quadratic, [2**k for k in range(3, 12)], (RATE,), protocol)
    believed = [result for result in results if not result.rejected]
    assert len(believed) >= 7
    batches, samples = [r.batch_size for r in believed], [r.samples for r in believed]
    fit = fit_critical_batch(batches, samples, relative=True)
    assert explained_share(fit, batches, samples) > 0.98

    # The noise scale tr(H Sigma) / G'HG, by gradients of single samples, as a mean over the way of the largest batch.
    noise, weights, scales = np.random.default_rng(1), np.ones(DIM), []
    while 0.5 * CURVATURE @ (weights * weights) > goal:
        gradients = CURVATURE * weights + noise.standard_normal((20_000, DIM))
        mean = gradients.mean(0)
        scales.append((CURVATURE @ gradients.var(0)) / (CURVATURE @ (mean * mean)))
        weights = weights - results[-1].parameters["rate"] * CURVATURE * weights
    assert 0.5 < fit.critical_batch / np.mean(scales) < 2
    rates = [r.parameters["rate"] for r in believed]
    assert rates[0] < rates[len(rates) // 2] / 3, "small batches need small steps"
    assert all(r.spread is not None and 0 < r.spread < r.samples for r in believed)


def descend(request: Request) -> Iterator[tuple[float, float]]:
    """Lose (1 - rate)^2 per step: one step at rate 1, and none to the goal beyond 2."""
    loss, samples = 1.0, 0
    while True:
        samples += request.batch_size
        loss *= (1 - request.parameters["rate"]) ** 2
        if loss > 1e6:
            raise DivergedError("too far")
        yield samples, loss


def test_an_optimum_beyond_the_range_extends_it_once() -> None:
    protocol = Protocol(goal=1e-3, higher_is_better=False, trials=16, repeats=0, most_samples=1e6)
    (near,) = steps_to_result(descend, [8], (Dimension(name="rate", low=0.01, high=0.5),), protocol)
    assert near.extended
    assert not near.rejected
    assert near.trials == 24
    assert 0.5 < near.parameters["rate"] < 1.5
    (far,) = steps_to_result(descend, [8], (Dimension(name="rate", low=1e-4, high=0.01),), protocol)
    assert far.extended
    assert far.edges == {"rate": "high"}
    assert far.rejected == "the best lies at the edge of the range of rate (high)"
    (natural,) = steps_to_result(descend, [8], (Dimension(name="rate", low=0.01, high=0.5, ends=("high",)),), protocol)
    assert not natural.extended
    assert not natural.rejected


def test_trials_that_diverge_are_told() -> None:
    protocol = Protocol(goal=1e-3, higher_is_better=False, trials=10, repeats=2, most_samples=1e4)
    (result,) = steps_to_result(descend, [8], (Dimension(name="rate", low=0.5, high=50.0),), protocol)
    assert 0 < result.diverged < 10
    assert result.reached + result.diverged <= 10
    assert result.repeated == (result.samples, result.samples)
    (hopeless,) = steps_to_result(descend, [8], (Dimension(name="rate", low=3.0, high=50.0),), protocol)
    assert (hopeless.diverged, hopeless.samples, hopeless.rejected) == (10, None, "no trial came to the goal")


def test_a_metric_that_is_not_finite_is_a_divergence() -> None:
    protocol = Protocol(goal=0.9, trials=2, repeats=0, most_samples=100)
    (result,) = steps_to_result(lambda request: [(8, 0.5), (16, math.nan)], [8], (RATE,), protocol)
    assert result.diverged == 2


def test_a_trial_that_cannot_win_stops_early() -> None:
    seen: list[float] = []

    def train(request: Request) -> Iterator[tuple[float, float]]:
        for step in range(1, 1001):
            seen.append(request.most_samples)
            yield step * request.batch_size, request.parameters["rate"] * step / 100

    protocol = Protocol(goal=1.0, trials=6, repeats=0, most_samples=8000, abort_factor=2.0, first={"rate": 1.0})
    (result,) = steps_to_result(train, [8], (Dimension(name="rate", low=1e-3, high=1.0, ends=("high",)),), protocol)
    assert result.samples == 800
    assert seen[:100] == [8000] * 100
    assert len(seen) <= 100 + 5 * 200, "no other trial went on beyond twice the best one's samples"
    assert set(seen[100:]) == {1600}


def test_hyperparameters_are_tuned_anew_with_one_budget(tmp_path: Path) -> None:
    protocol = Protocol(goal=0.3, higher_is_better=False, trials=7, repeats=2, most_samples=1e5, first={"rate": 0.1})
    with StudyFolder(tmp_path, kind="toy", settings={}, quiet=True) as study:
        results = steps_to_result(train_quadratic, [64, 256], (RATE,), protocol, study)
    names = [f"{batch}/{n}" for batch in (64, 256) for n in (*range(7), "repeat-0", "repeat-1")]
    assert list(study.records) == names
    assert study.records["64/0"]["parameters"] == study.records["256/0"]["parameters"] == {"rate": 0.1}
    assert study.records["256/1"]["parameters"] == results[0].parameters
    others = {study.records[f"{batch}/{n}"]["parameters"]["rate"] for batch in (64, 256) for n in range(2, 7)}
    assert len(others) == 10
    assert {study.records[f"64/{n}"]["seed"] for n in range(7)} == {0}
    assert [study.records[f"64/repeat-{n}"]["seed"] for n in range(2)] == [1, 2]


def test_what_is_best_already_is_not_tried_twice() -> None:
    asked: list[tuple[int, float]] = []

    def train(request: Request) -> Iterator[tuple[float, float]]:
        rate = request.parameters["rate"]
        asked.append((request.batch_size, rate))
        yield from ((step * request.batch_size, step / (1 + abs(rate - RATE.high))) for step in range(1, 100))

    # Beyond the range, and so the same as the best one of the batch size before only once both are clipped.
    protocol = Protocol(goal=20.0, trials=6, repeats=0, first={"rate": 9.0})
    results = steps_to_result(train, [8, 16], (RATE,), protocol)
    assert results[0].parameters == {"rate": RATE.high}
    assert [rate for _, rate in asked].count(RATE.high) == 2
    assert len(set(asked)) == len(asked) == 12


@pytest.mark.parametrize("kept", [1, 6, 10, 15])
def test_what_was_stopped_proposes_what_it_would_have(kept: int, tmp_path: Path) -> None:
    protocol = Protocol(goal=0.3, higher_is_better=False, trials=9, repeats=1, most_samples=1e5)

    def study_into(folder: Path) -> list[str]:
        with StudyFolder(folder, kind="toy", settings={}, quiet=True) as study:
            steps_to_result(train_quadratic, [64, 256], (RATE,), protocol, study)
        lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
        return [line[: line.index('"seconds"')] for line in lines]

    whole = study_into(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "trials.jsonl").write_text("".join(lines[:kept]))
    assert study_into(tmp_path / "cut") == whole


def test_the_goal_is_crossed_between_two_evaluations() -> None:
    course = [(100.0, 0.60), (200.0, 0.70), (300.0, 0.74), (400.0, 0.72)]
    assert find_crossing(course, 0.72, higher_is_better=True) == pytest.approx(250)
    assert find_crossing(course, 0.70, higher_is_better=True) == 200
    assert find_crossing(course, 0.55, higher_is_better=True) == 100
    assert find_crossing(course, 0.75, higher_is_better=True) is None
    assert find_crossing([(10.0, 0.9), (20.0, 0.5)], 0.6, higher_is_better=False) == pytest.approx(17.5)
    assert find_crossing([], 0.6, higher_is_better=False) is None

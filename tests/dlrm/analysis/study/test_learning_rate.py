"""A range test finds the stable rates of a quadratic; a study ranks the best policy first, and goes on after a stop."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlrm.analysis.study.compare_policies import (
    PolicyResult,
    PolicyRun,
    can_be_told_apart,
    common_goal,
    compare_policies,
)
from dlrm.analysis.study.learning_rate_page import describe_advice
from dlrm.analysis.study.policies import choose_policies, list_policies, without_schedules
from dlrm.analysis.study.range_test import range_test, rising_shape
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.cli import parse
from dlrm.config import RunConfig, SmallTablesConfig, TablesConfig
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.recipes import RECIPES

CURVATURE = np.geomspace(1, 0.01, 30)
STEPS = 400
SHAPES = {
    "constant": Schedule(),
    "planted": Schedule(shape=f"poly({STEPS}, power=1)"),
    "late": Schedule(shape=f"step({STEPS // 2}, gamma=1e-6)"),
}


def descend(rates: Iterator[float], seed: int, noise: float = 1.0) -> Iterator[tuple[float, float]]:
    """Yield (rate, loss) of a noisy quadratic, the loss before each step."""
    draw, weights = np.random.default_rng(seed), np.ones(len(CURVATURE))
    for rate in rates:
        loss = 0.5 * float(CURVATURE @ (weights * weights))
        yield rate, loss if loss < 1e9 else math.inf
        if loss >= 1e9:
            return
        weights = weights - rate * (CURVATURE * weights + noise * draw.standard_normal(len(CURVATURE)))


def train_policy(wanted: PolicyRun) -> dict[str, Any]:
    """Return what a policy comes to on the quadratic; 1 + loss is the metric, and less is better."""
    assert wanted.factor is not None
    schedule = SHAPES[wanted.policy]
    rates = (0.3 * wanted.factor * schedule.factor(step + 0.5) for step in range(STEPS))
    losses = [1 + loss for _, loss in descend(rates, wanted.seed, noise=0.3)]
    if not math.isfinite(losses[-1]):
        return {"best": None, "course": [], "diverged": "far", "factor": wanted.factor}
    course = [(step, losses[step]) for step in range(9, STEPS, 10)]
    return {"best": losses[-1], "course": course, "diverged": "", "factor": wanted.factor}


@pytest.mark.parametrize("largest_curvature", [0.1, 1.0, 30.0])
def test_the_range_test_suggests_a_rate_that_is_stable_and_not_timid(largest_curvature: float) -> None:
    # Beyond 2 / largest curvature, gradient descent diverges.
    limit = 2 / largest_curvature
    schedule = Schedule(shape=rising_shape(1e-4 * limit, 1e2 * limit, 300))
    asked: list[float] = []

    def rates() -> Iterator[float]:
        for step in range(300):
            asked.append(schedule.factor(step + 0.5))
            yield asked[-1] * largest_curvature  # a quadratic 30 times as steep takes a step 30 times as long

    losses = (loss for _, loss in descend(rates(), seed=0, noise=0.1))
    found = range_test((asked[-1], loss) for loss in losses)
    assert found.has_turned
    assert 0.1 * limit < found.suggested < limit
    assert found.suggested < found.largest
    assert len(found.factors) < 300, "it stops once the loss has turned"


def test_a_range_that_ends_too_early_or_begins_too_late_says_so() -> None:
    found = range_test([(10.0**power, 1.0 - 0.01 * power) for power in range(20)])
    assert not found.has_turned
    with pytest.raises(ValueError, match="finite loss at the least factor"):
        range_test([(0.1, math.nan), (0.2, 0.3)])
    assert range_test([(0.1, 1.0), (0.2, 0.9), (0.3, math.inf)], smoothing=0.0).largest == 0.2


def test_the_planted_policy_comes_first_and_each_had_its_best_rate() -> None:
    factors = dict.fromkeys(SHAPES, (0.1, 1.0, 30.0))
    results = compare_policies(train_policy, list(SHAPES), factors, seeds=4, higher_is_better=False)
    assert results[0].policy == "planted"
    assert can_be_told_apart(results[0], results[-1])
    assert not can_be_told_apart(results[0], results[0])
    assert all(result.factor in (0.1, 1.0) for result in results), "30 diverges"
    assert all(len(result.runs) == 4 and result.deviation is not None for result in results)
    goal = common_goal(results, higher_is_better=False)
    assert goal is not None
    assert goal == max(record["best"] for result in results for record in result.runs)
    reached = {result.policy: result.samples_to(goal * 1.01, higher_is_better=False) for result in results}
    assert all(samples is not None and 0 < samples < STEPS for samples in reached.values())
    assert results[0].samples_to(1.0, higher_is_better=False) is None


def test_a_policy_that_diverges_comes_last() -> None:
    results = compare_policies(
        train_policy, ["planted", "constant"], {"planted": [30.0], "constant": [0.1]}, seeds=2, higher_is_better=False
    )
    assert [result.policy for result in results] == ["constant", "planted"]
    assert results[1].value is None
    assert can_be_told_apart(*results)


@pytest.mark.parametrize("done", [0, 2, 5, 9])
def test_a_comparison_that_was_stopped_goes_on(done: int, tmp_path: Path) -> None:
    factors = dict.fromkeys(SHAPES, (0.1, 1.0))
    trained: list[str] = []

    def train(wanted: PolicyRun) -> dict[str, Any]:
        if len(trained) == done and done:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(wanted.name)
        return train_policy(wanted)

    def compare() -> list[Any]:
        with StudyFolder(tmp_path, kind="toy", settings={}, quiet=True) as study:
            return compare_policies(train, list(SHAPES), factors, seeds=2, higher_is_better=False, study=study)

    if done:
        with pytest.raises(KeyboardInterrupt):
            compare()
    results = compare()
    names = [name for name in trained if name != "stopped"]
    assert len(names) == len(set(names)) == 12
    whole = compare_policies(train_policy, list(SHAPES), factors, seeds=2, higher_is_better=False)
    assert [(r.policy, r.value) for r in results] == [(r.policy, r.value) for r in whole]


def test_every_policy_is_flags_that_exist() -> None:
    run, samples = RECIPES["synthetic"].config, 1e6
    for policy in list_policies(samples).values():
        config = policy.configure(run, 2.0)
        assert config.tables.learning_rate == 2 * run.tables.learning_rate
        assert config.dense.learning_rate == 2 * run.dense.learning_rate
        if policy.keeps_schedules:
            assert config.dense_schedule == run.dense_schedule
        elif policy.name in ("linear", "poly", "cosine", "rsqrt", "range-test"):
            factors = [config.dense_schedule.factor(s) for s in (25_000, 60_000, 500_000, 999_900)]
            assert factors[0] == pytest.approx(0.5)
            assert factors[1] > factors[2] > factors[3]
            assert factors[3] < 0.01
            assert config.tables_schedule == config.dense_schedule
        if policy.name == "plateau":
            assert config.plateau.policy == "reduce"
        if policy.name == "lanczos":
            assert config.curvature_rate.every_samples == 50_000
            assert config.dense == DenseOptimizerConfig(name="sgd", learning_rate=2 * run.dense.learning_rate)


def test_a_policy_takes_the_place_of_all_that_a_recipe_has() -> None:
    shape = Schedule(shape="warmup(7)")
    run = RunConfig(
        dense=DenseOptimizerConfig(betas=(0.8, 0.9), eps=1e-3, trust_clip=True, weight_decay=0.1, learning_rate=0.5),
        head=HeadConfig(learning_rate=0.25),
        tables=TablesConfig(learning_rate=0.5),
        small_tables=SmallTablesConfig(below_rows=9, learning_rate=0.75),
        dense_schedule=shape,
        head_schedule=shape,
        tables_schedule=shape,
        small_tables_schedule=shape,
    )
    policies = list_policies(1e6)
    lanczos = policies["lanczos"].configure(run, 3.0)
    assert lanczos.dense == DenseOptimizerConfig(name="sgd", learning_rate=1.5, weight_decay=0.1)
    assert (lanczos.head.learning_rate, lanczos.small_tables.learning_rate) == (0.75, 2.25)
    assert (lanczos.head_schedule, lanczos.small_tables_schedule) == (Schedule(), Schedule())
    kept = policies["recipe"].configure(run, 2.0)
    assert (kept.head_schedule, kept.small_tables_schedule) == (shape, shape)
    # Told as flags, it is the same but for the schedules, which the page says are to be left out.
    without = without_schedules(run)
    flags = shlex.split(" ".join(policies["lanczos"].list_flags(run, 3.0)))
    assert parse(RunConfig, flags, program="train", default=without) == lanczos
    best = PolicyResult(policy="lanczos", factor=3.0, runs=({"factor": 3.0},), tried=(), value=0.7, deviation=None)
    advice = " ".join(describe_advice([best], policies, run))
    assert "its factor moved the tables' alone" in advice
    assert "--small-tables.learning-rate 2.25" in advice


def test_own_policies_are_flags_of_train() -> None:
    (own,) = choose_policies([], ["slow=--dense.learning-rate 1e-4 --dense-schedule.shape 'warmup(7) * 0.5'"], 1e6)
    config = own.configure(RECIPES["synthetic"].config, 3.0)
    assert config.dense.learning_rate == pytest.approx(3e-4)
    assert config.dense_schedule == Schedule(shape="warmup(7) * 0.5")
    told = shlex.split(" ".join(own.list_flags(RECIPES["synthetic"].config, 3.0)))
    run = parse(RunConfig, told, program="train", default=without_schedules(RECIPES["synthetic"].config))
    assert run.dense.learning_rate == pytest.approx(3e-4), "the rate with its factor, not the one in the flags"


@pytest.mark.parametrize(
    ("names", "own", "words"),
    [
        (["cosine", "cubic"], [], r"--policies: expected some of recipe, .*, got 'cubic'"),
        (["cosine"], ["--dense.learning-rate 1"], "--own: expected NAME=FLAGS"),
        (["cosine", "cosine"], [], "--policies: expected different names"),
        ([], [], "--policies: expected different names, got none"),
    ],
)
def test_policies_that_do_not_exist_are_named(names: list[str], own: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_policies(names, own, 1e6)


def test_an_own_policy_with_a_wrong_flag_is_named() -> None:
    (own,) = choose_policies([], ["bad=--dense.rate 1"], 1e6)
    with pytest.raises(ValueError, match=r"^policy bad: .*dense\.rate.*run recforge train --help"):
        own.configure(RECIPES["synthetic"].config)

"""A trial whose weights are no longer numbers is one that diverged, wherever that is found out first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.analysis.curvature.lanczos import lanczos
from dlrm.analysis.study.batch_size import Trainers
from dlrm.analysis.study.space import parse_space
from dlrm.analysis.study.steps_to_result import Protocol, steps_to_result
from dlrm.analysis.study.trial_run import TrialRunner
from dlrm.config import EvaluationConfig, ModelConfig, RunConfig, StepConfig
from dlrm.data.dataset import Dataset
from dlrm.diverged import DivergedError
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.recipes import RECIPES

RATE = 1e28
STEP = 6000


@pytest.fixture
def make_runner(click_log: Dataset, tmp_path: Path) -> Callable[..., tuple[TrialRunner, RunConfig]]:
    """A function that returns a runner, and a configuration of two steps."""

    def make() -> tuple[TrialRunner, RunConfig]:
        run = RunConfig(
            data=click_log.folder,
            model=ModelConfig(dim=4, bottom=(8,), top=(8,)),
            step=StepConfig(global_batch_size=STEP, threads=1),
            dense=DenseOptimizerConfig(name="sgd", learning_rate=RATE),
            evaluation=EvaluationConfig(every_samples=STEP),
        )
        return TrialRunner("synthetic", RECIPES["synthetic"], run, tmp_path), run

    return make


def test_weights_that_an_evaluation_finds_to_be_no_numbers_are_a_divergence(
    make_runner: Callable[..., tuple[TrialRunner, RunConfig]],
) -> None:
    runner, run = make_runner()
    # The first loss is finite; the evaluation after the step is what finds out.
    trial = runner.run("far", run)
    assert trial.summary is None
    assert "logits: expected a number" in trial.diverged
    assert not trial.records("valid")
    trainers = Trainers(runner, run, most_samples=2 * STEP, evaluations=2)
    space = parse_space([f"dense.learning_rate={RATE / 2}:{2 * RATE}"])
    protocol = Protocol(goal=0.6, trials=1, repeats=1, most_samples=2 * STEP)
    (result,) = steps_to_result(lambda request: trainers.start(request, 0.6), [STEP], space, protocol)
    assert (result.diverged, result.trials) == (1, 1)
    assert result.rejected == "no trial came to the goal"


def test_a_trial_that_cannot_learn_is_a_result(make_runner: Callable[..., tuple[TrialRunner, RunConfig]]) -> None:
    runner, run = make_runner()
    dead = replace(
        run,
        dense=replace(run.dense, learning_rate=1e-30),
        tables=replace(run.tables, learning_rate=0.0, init_scale=0.0),
        evaluation=EvaluationConfig(every_samples=STEP // 2),
        step=replace(run.step, global_batch_size=STEP // 2),
    )
    trial = runner.run("dead", dead)
    assert not trial.diverged
    assert len(trial.records("valid")) == 4, "no guard has stopped it"


def test_products_that_are_no_numbers_are_a_divergence() -> None:
    with pytest.raises(DivergedError, match="lanczos: expected products of finite numbers"):
        lanczos(lambda vector: vector * torch.nan, torch.ones(3), 2)

"""Measuring the noise changes nothing of what is learned, never ends a run, and goes on after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.config import CheckpointConfig, EvaluationConfig, StepConfig, TrainingConfig
from dlrm.noise.config import NoiseScaleConfig
from dlrm.noise.dense_gradients import LinearRule
from dlrm.noise.gradient_meter import GradientMeter
from dlrm.noise.preconditioner import Preconditioner
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.noise_watch import NoiseWatch
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer


def config_of(**noise: Any) -> TrainingConfig:
    return TrainingConfig(
        epochs=0.2,
        log_every_samples=200,
        dense=DenseOptimizerConfig(name="adam", learning_rate=0.01),
        step=StepConfig(global_batch_size=200, device="cpu", threads=1),
        evaluation=EvaluationConfig(every_samples=1_000, test_best=False),
        noise_scale=NoiseScaleConfig(**noise),
    )


def train(dataset: Any, model: Any, config: TrainingConfig, output: Path) -> list[dict[str, Any]]:
    Trainer(model, dataset, config, output).fit()
    timed = ("seconds", "samples_per_second", "stages")
    records = [record for record in read_records(output) if record["kind"] == "train"]
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def without_noise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in r.items() if not name.startswith("noise_scale/")} for r in records]


def test_what_is_learned_is_the_same_to_the_last_bit(click_log, make_dlrm, tmp_path: Path) -> None:
    measured = train(click_log, make_dlrm(click_log), config_of(every_steps=3), tmp_path / "measured")
    plain = train(click_log, make_dlrm(click_log), config_of(every_steps=0), tmp_path / "plain")
    assert without_noise(measured) == plain
    last = measured[-1]
    assert last["noise_scale/dense"] > 0
    assert {"noise_scale/top", "noise_scale/tables", "noise_scale/ids/in_1_of_100"} <= last.keys()
    assert any(name.startswith("noise_scale/table/") for name in last)


def test_a_failure_is_said_once_and_ends_nothing(click_log, make_dlrm, tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr(LinearRule, "squared_norms", fail)
    records = train(click_log, make_dlrm(click_log), config_of(every_steps=2), tmp_path / "run")
    assert len(records) == 12
    assert without_noise(records) == records
    told = "recforge: the gradients' noise was not measured: RuntimeError: no memory for this"
    assert capsys.readouterr().err.count(told) == 1


def test_goes_on_after_a_kill(click_log, make_dlrm, tmp_path: Path, monkeypatch) -> None:
    config = config_of(every_steps=3)
    config = TrainingConfig(**(vars(config) | {"checkpoint": CheckpointConfig(every_samples=400)}))
    whole = train(click_log, make_dlrm(click_log), config, tmp_path / "whole")
    after_step = NoiseWatch.after_step

    def fail(self: NoiseWatch, moment: Any, loss: float) -> None:
        if moment.samples >= 1_400:
            raise OSError("the lights went out")
        after_step(self, moment, loss)

    with monkeypatch.context() as patched:
        patched.setattr(NoiseWatch, "after_step", fail)
        with pytest.raises(OSError, match="the lights"):
            train(click_log, make_dlrm(click_log), config, tmp_path / "killed")
    assert train(click_log, make_dlrm(click_log), config, tmp_path / "killed") == whole


@pytest.mark.parametrize("name", ["adam", "adagrad", "lamb"])
def test_preconditioned_by_what_the_optimizer_divides_by(click_log, make_dlrm, tmp_path: Path, name: Any) -> None:
    dense = DenseOptimizerConfig(name=name, learning_rate=0.01, eps=1e-6)
    config = TrainingConfig(**(vars(config_of(every_steps=2, preconditioned=True)) | {"dense": dense}))
    trainer = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")
    trainer.fit()
    precondition = Preconditioner(trainer.optimizer)
    assert precondition.is_ready
    parameter = trainer.model.dense.top[0].weight
    state = trainer.optimizer.state[parameter]
    correction = 1 - 0.999 ** float(state["step"])
    squares = state["sum"] if name == "adagrad" else state["exp_avg_sq"] / correction
    expected = 1 / (squares.maximum(squares.mean() / 100).sqrt() + 1e-6)
    torch.testing.assert_close(precondition(parameter), expected)
    (watch,) = (member for member in trainer.attachments.members if isinstance(member, NoiseWatch))
    assert watch.scales["dense"].measurements == 5  # of every second step, but not the first, which knows no moments
    assert watch.scales["dense"].variance > 0


@pytest.mark.parametrize("name", ["factored", "lars", "sgd"])
@pytest.mark.parametrize("flag", ["dense", "head"])
def test_refuses_to_precondition_by_what_no_optimizer_holds(click_log, make_dlrm, tmp_path, name, flag) -> None:
    """It would wait for second moments until the run's end, and measure nothing."""
    of_part = (
        {"dense": DenseOptimizerConfig(name=name)}
        if flag == "dense"
        else {"head": HeadConfig(name=name, learning_rate=0.1)}
    )
    config = TrainingConfig(**(vars(config_of(every_steps=2, preconditioned=True)) | of_part))
    message = rf"--noise-scale.preconditioned: expected --{flag}.name lamb, adam, adamw, adagrad, got {name}$"
    with pytest.raises(ValueError, match=message):
        Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"--noise-scale.every-steps: expected at least 0, got -1"):
        NoiseScaleConfig(every_steps=-1)
    with pytest.raises(ValueError, match=r"--noise-scale.decay: expected a number in \[0, 1\), got 1.0"):
        NoiseScaleConfig(decay=1.0)


def test_preconditioned_noise_after_a_few_steps_is_that_of_well_known_moments() -> None:
    """Weights that samples hardly ever move have second moments of 0 then, and must not be all of the noise."""
    torch.manual_seed(0)
    model = torch.nn.Linear(400, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9, eps=1e-10)  # gradients stay those of the first weights
    shares = torch.cat([torch.full((20,), 1.0), torch.full((380,), 1 / 4000)])
    truth = torch.randn(400)
    meter, precondition, found = GradientMeter(model), Preconditioner(optimizer), {}
    for step in range(600):
        inputs = torch.randn(64, 400) * (torch.rand(64, 400) < shares)
        meter.open()
        loss = (model(inputs).squeeze(1) - inputs @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step:
            estimate = meter.finish(64, 64, precondition=precondition).groups["dense"].estimate()
            found.setdefault("early" if step < 20 else "late" if step >= 500 else "between", []).append(estimate)
        optimizer.step()
    early, late = (sum(e.variance for e in found[when]) / len(found[when]) for when in ("early", "late"))
    assert 0 < late / 3 < early < 3 * late


def test_below_a_batch_norm_only_the_noise_of_tables_is_told(click_log, make_dlrm, tmp_path: Path) -> None:
    model = make_dlrm(click_log, batch_norm="ghost", ghost_size=50)
    records = train(click_log, model, config_of(every_steps=2), tmp_path / "run")
    told = {name.removeprefix("noise_scale/").split("/")[0] for name in records[-1] if name.startswith("noise_scale/")}
    assert told - {"tables"} == {"table", "ids", "left_out"}
    for name, follower in {
        "--growth.test norm": {"growth": BatchGrowthConfig(test="norm")},
        "--rule adascale": {"rule": "adascale", "scale_from": 50},
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a model without batch norm"):
            Trainer(model, click_log, replace(config_of(every_steps=2), **follower), tmp_path / "no")

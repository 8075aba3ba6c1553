"""Measuring the noise changes nothing of what is learned, never ends a run, and goes on after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm.config import CheckpointConfig, EvaluationConfig, StepConfig, TrainingConfig
from dlrm.noise.config import NoiseScaleConfig
from dlrm.noise.dense_gradients import LinearRule
from dlrm.noise.preconditioner import Preconditioner
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
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
    if name == "adagrad":
        expected = 1 / (state["sum"].sqrt() + 1e-6)
    else:
        expected = 1 / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-6)
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

"""AdaScale follows the measured gain, and schedules advance by it; stages of a schedule set the batch's size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlrm.config import EvaluationConfig, GuardConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.model import DLRM
from dlrm.noise.config import NoiseScaleConfig
from dlrm.noise.noise_scale import GradientNoiseScale, NoiseEstimate
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.adascale import AdaScale
from dlrm.training.attachments import Moment
from dlrm.training.batch_growth_config import BatchGrowthConfig
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

CONFIG = TrainingConfig(
    epochs=0.5,
    dense=DenseOptimizerConfig(name="sgd", learning_rate=0.01),
    step=StepConfig(global_batch_size=600),
    noise_scale=NoiseScaleConfig(every_steps=2),
    log_every_samples=600,
    evaluation=EvaluationConfig(every_samples=6000),
    guards=GuardConfig(chance_evaluations=0),
)


def _moment(samples: int, size: int = 800) -> Moment:
    return Moment(batch=cast(Any, None), samples=samples, global_size=size, batch_size=800)


def _attach(*, is_adaptive: bool) -> tuple[AdaScale, GradientNoiseScale]:
    scale = GradientNoiseScale()
    return AdaScale(cast(Any, SimpleNamespace(scales={"dense": scale})), 100, is_adaptive=is_adaptive), scale


def test_steps_count_for_their_gain_in_base_batches() -> None:
    adascale, scale = _attach(is_adaptive=False)
    adascale.before_step(_moment(0))
    assert (adascale.factor("dense"), adascale.position(400)) == (1, 50)  # nothing was measured yet
    adascale.after_step(_moment(0), 0.5)
    scale.add(NoiseEstimate(squared_norm=1.0, variance=300.0))  # of single samples: 3 of a base batch
    gain = (3 + 1) / (3 / 8 + 1)
    for step, size in ((1, 800), (2, 200)):  # the last one cut short
        adascale.before_step(_moment(800 * step, size))
        assert adascale.factor("head") == pytest.approx(gain)
        assert (adascale.factor("tables"), adascale.factor("small_tables")) == (1, 1)
        adascale.after_step(_moment(800 * step, size), 0.5)
    assert adascale.progress == pytest.approx(100 + 100 * gain + 25 * gain)
    again, _ = _attach(is_adaptive=False)
    again.load_state(adascale.state())
    assert again.progress == adascale.progress


def test_what_divides_by_the_gradient_takes_the_root_and_advances_as_far() -> None:
    plain, adaptive = _attach(is_adaptive=False), _attach(is_adaptive=True)
    for adascale, scale in (plain, adaptive):
        scale.add(NoiseEstimate(squared_norm=1.0, variance=300.0))
        adascale.before_step(_moment(0))
    assert adaptive[0].factor("dense") == pytest.approx(plain[0].factor("dense") ** 0.5)
    assert adaptive[0].position(0) == plain[0].position(0)


def test_in_a_run_rates_follow_the_gain_and_the_schedule_its_progress(
    tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset
) -> None:
    config = replace(CONFIG, rule="adascale", scale_from=100, dense_schedule=Schedule(shape="exp(1000)"))
    trainer = Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")
    trainer.fit()
    records = [record for record in read_records(tmp_path / "run") if record["kind"] == "train"]
    assert len(records) == 10
    assert records[0]["adascale_gain"] == 1
    assert all(1 <= record["adascale_gain"] <= 6 for record in records)
    assert records[-1]["adascale_gain"] > 1.5
    for before, after in zip([{"adascale_progress": 0.0}, *records], records, strict=False):
        middle = (before["adascale_progress"] + after["adascale_progress"]) / 2
        expected = 0.01 * after["adascale_gain"] * 0.1 ** (middle / 1000)
        assert after["dense_learning_rate"] == pytest.approx(expected, rel=1e-6)
    unwatched = replace(config, noise_scale=NoiseScaleConfig(every_steps=0))
    with pytest.raises(ValueError, match=r"--rule adascale: expected --noise-scale\.every-steps of at least 1"):
        Trainer(make_dlrm(click_log), click_log, unwatched, tmp_path / "unwatched")


def test_stages_of_a_schedule_are_batch_sizes_too(
    tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset
) -> None:
    stages = Schedule(shape="stages((3000, 600, 1200), (3000, 300, 600, 0.5))")
    config = replace(CONFIG, dense_schedule=stages, noise_scale=NoiseScaleConfig(every_steps=0))
    Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run").fit()
    records = [record for record in read_records(tmp_path / "run") if record["kind"] == "train"]
    sizes = {record["samples"]: record["batch_size"] for record in records}
    assert sizes == dict.fromkeys(range(600, 3001, 600), 600) | dict.fromkeys(range(3600, 6001, 600), 300)
    rates = [record["dense_learning_rate"] for record in records]
    # At the middles of batches: 300, 900 ... of the first stage, then 450, 1050 ... of the second.
    assert rates == pytest.approx([0.01 * f for f in (0.25, 0.75, 1, 1, 1, 0.5 * 450 / 600, 0.5, 0.5, 0.5, 0.5)])


def test_stages_have_to_agree_with_the_rest_of_a_configuration() -> None:
    stages = Schedule(shape="stages((900, 64), (100, 32))")
    with pytest.raises(ValueError, match=r"--step.global-batch-size: expected 64, the schedule's first stage, got 600"):
        replace(CONFIG, tables_schedule=stages)
    staged = replace(CONFIG, step=StepConfig(global_batch_size=64), tables_schedule=stages)
    assert staged.staged_batches == ((0, 64), (900, 32))
    with pytest.raises(ValueError, match=r"--rule: expected none beside stages"):
        replace(staged, rule="adascale", scale_from=32)
    with pytest.raises(ValueError, match=r"--scale-from: expected beside --rule sqrt"):
        replace(staged, rule="sqrt")
    with pytest.raises(ValueError, match="--growth: expected no growth beside stages"):
        replace(staged, growth=BatchGrowthConfig(stages=("500=128",)))
    with pytest.raises(ValueError, match=r"--dense-schedule.shape: expected the batch sizes of one stages"):
        replace(staged, dense_schedule=Schedule(shape="stages((900, 64), (100, 16))"))

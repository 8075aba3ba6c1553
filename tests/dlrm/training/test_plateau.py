"""Plateaus of the valid split steer learning rates: as torch's scheduler does, and exactly after a stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dlrm.cli import parse
from dlrm.config import EvaluationConfig, GuardConfig, RunConfig, StepConfig, TrainingConfig
from dlrm.data.dataset import Dataset
from dlrm.metrics.metrics import MetricValues
from dlrm.model import DLRM
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.plateau import PlateauConfig, find_plateau_doubt
from dlrm.training.attachments import Moment
from dlrm.training.plateau import ChangeOnPlateau, ReduceOnPlateau
from dlrm.training.run_log import read_records
from dlrm.training.trainer import Trainer

REDUCE = PlateauConfig(policy="reduce", patience=1, factor=0.5)
CHANGE = PlateauConfig(policy="change", patience=1, shapes=("0.1", "1", "exp(1000, gamma=0.5)"), start=1)


def _measured(value: float) -> MetricValues:
    class Values:
        auc = logloss = value

    return cast(MetricValues, Values())


@given(
    losses=st.lists(st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.4]) | st.floats(0, 1), max_size=30),
    patience=st.integers(1, 4),
    cooldown=st.integers(0, 3),
    least_gain=st.sampled_from([0.0, 0.05]),
)
def test_it_reduces_as_torchs_scheduler_does(
    losses: list[float], patience: int, cooldown: int, least_gain: float
) -> None:
    config = replace(REDUCE, patience=patience, cooldown=cooldown, least_gain=least_gain, factor=0.3, floor=0.001)
    ours = ReduceOnPlateau(config, "logloss")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = ReduceLROnPlateau(
        optimizer, factor=0.3, patience=patience - 1, cooldown=cooldown, threshold=least_gain, threshold_mode="abs",
        min_lr=0.001, eps=0,
    )  # fmt: skip
    for samples, loss in enumerate(losses):
        ours.after_evaluation(_measured(loss), samples)
        theirs.step(loss)
        assert ours.factor("dense") == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_a_higher_auc_is_a_gain_and_one_that_is_undefined_is_nothing() -> None:
    policy = ReduceOnPlateau(replace(REDUCE, patience=2), "auc")
    for samples, auc in enumerate([0.6, 0.7, 0.7, math.nan, 0.8, 0.7, math.nan]):
        policy.after_evaluation(_measured(auc), samples)
        assert policy.factor("tables") == 1.0
    policy.after_evaluation(_measured(0.8), 7)
    assert policy.factor("tables") == 0.5


@pytest.mark.parametrize(
    ("groups", "factors"), [("all", [0.5] * 4), ("dense", [0.5, 0.5, 1, 1]), ("tables", [1, 1, 0.5, 0.5])]
)
def test_only_the_groups_that_were_named_follow(groups: Any, factors: list[float]) -> None:
    policy = ReduceOnPlateau(replace(REDUCE, groups=groups), "auc")
    for auc in (0.6, 0.6):
        policy.after_evaluation(_measured(auc), 1)
    assert [policy.factor(group) for group in ("dense", "head", "tables", "small_tables")] == factors


def _moment(samples: int) -> Moment:
    return Moment(batch=cast(Any, None), samples=samples, global_size=100, batch_size=100)


def test_it_changes_to_bolder_shapes_early_and_to_calmer_ones_late() -> None:
    policy = ChangeOnPlateau(replace(CHANGE, cooldown=1), "auc", total_samples=1000)
    shapes = []
    for samples in range(100, 1300, 100):  # no evaluation gains anything; every second one cools down
        policy.before_step(_moment(samples - 100))
        policy.after_evaluation(_measured(0.6), samples)
        shapes.append(policy.values()["plateau_shape"])
    assert shapes == [1, 2, 2, 2, 2, 2, 2, 1, 1, 0, 0, 0]
    policy.before_step(_moment(500))
    assert policy.factor("dense") == pytest.approx(0.1)
    bold = ChangeOnPlateau(replace(CHANGE, start=2), "auc", total_samples=1000)
    bold.before_step(_moment(500))
    assert bold.factor("dense") == pytest.approx(0.5**0.55)  # at the middle of the batch


# Calmer throughout, as what is late in a run depends on its end.
@pytest.mark.parametrize("config", [REDUCE, replace(CHANGE, bold_until=0, start=2)], ids=["reduce", "change"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, make_dlrm: Callable[..., DLRM], click_log: Dataset, config: PlateauConfig
) -> None:
    run = TrainingConfig(
        step=StepConfig(global_batch_size=500),
        log_every_samples=500,
        evaluation=EvaluationConfig(every_samples=1000),
        guards=GuardConfig(chance_evaluations=0),
        dense_schedule=Schedule(shape="1e-9"),  # so that nothing gets better
        tables_schedule=Schedule(shape="1e-9"),
        plateau=config,
    )
    ends = []
    for name, stops in (("whole", [0.5]), ("cut", [0.25, 0.5])):
        for epochs in stops:
            trainer = Trainer(make_dlrm(click_log), click_log, replace(run, epochs=epochs), tmp_path / name)
            trainer.fit()
        ends.append({key: tensor.clone() for key, tensor in trainer.model.state_dict().items()})
    factors = [
        [record["plateau_factor"] for record in read_records(tmp_path / name) if record["kind"] == "train"]
        for name in ("whole", "cut")
    ]
    assert len(factors[0]) == 12
    assert len(set(factors[0])) > 3
    assert factors[0] == factors[1]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"patience": 0}, "--plateau.patience: expected at least 1, got 0"),
        ({"factor": 1.5}, "--plateau.factor: expected a number between 0 and 1, got 1.5"),
        ({"policy": "change"}, "--plateau.shapes: expected two formulas or more"),
        ({"shapes": ("1", "2")}, "--plateau.shapes: .* and none without it"),
        ({"policy": "change", "shapes": ("1", "cosin(3)")}, "--plateau.shapes: .* perhaps cosine"),
        (
            {"policy": "change", "shapes": ("1", "2"), "start": 2},
            "--plateau.start: .* one of the shapes, from 0, got 2",
        ),
    ],
)
def test_nonsense_names_its_flag(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PlateauConfig(**options)


def test_a_plateau_that_nothing_shows_is_an_error(
    make_dlrm: Callable[..., DLRM], click_log: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Dataset.rows
    monkeypatch.setattr(Dataset, "rows", lambda self, split: 0 if split == "valid" else rows(self, split))
    config = TrainingConfig(step=StepConfig(device="cpu"), plateau=REDUCE)
    with pytest.raises(
        ValueError, match=r"--plateau.policy reduce: expected rows in the valid split to follow, got none"
    ):
        Trainer(make_dlrm(click_log), click_log, config, tmp_path / "run")


def test_a_plateau_that_comes_too_late_is_doubted() -> None:
    assert find_plateau_doubt(PlateauConfig(), 12_000, 12_000) is None
    doubt = find_plateau_doubt(REDUCE, 12_000, 12_000)
    assert doubt is not None
    assert (
        "it takes 2 evaluations before the end, and there are 0; give --evaluation.every-samples of at most 5,999"
        in doubt
    )
    assert find_plateau_doubt(REDUCE, 12_000, 5_999) is None
    assert find_plateau_doubt(REDUCE, 12_000, 6_000) is not None  # the second one is at the end


def test_it_has_flags() -> None:
    flags = ["--plateau.policy", "change", "--plateau.shapes", "0.3", "1", "exp(9)"]
    config = parse(RunConfig, flags, program="recforge train synthetic").plateau
    assert config == PlateauConfig(policy="change", shapes=("0.3", "1", "exp(9)"))

"""Flags of growing batches that are out of range, do not go together or would do nothing are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.batch_growth_config import BatchGrowthConfig, parse_stages
from dlrm.training.trainer import Trainer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ("5",)}, "--growth.stages: expected FROM=SIZE, as 1000000=8192, got '5'"),
        ({"stages": ("5=10", "4=20")}, "--growth.stages: expected samples above 0 and sizes that ascend"),
        ({"stages": ("5=10",), "test": "norm"}, "--growth.stages: expected one way of growing"),
        ({"norm_tolerance": 0.0}, "--growth.norm-tolerance: expected a number > 0, got 0.0"),
        ({"step_ratio": 1.0}, "--growth.step-ratio: expected a number > 1, got 1.0"),
        ({"round_to": 0}, "--growth.round-to: expected at least 1, got 0"),
    ],
)
def test_refuses_what_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        BatchGrowthConfig(**settings)


def test_refuses_what_does_not_go_together(click_log, make_dlrm, tmp_path: Path, config_of) -> None:
    cases = {
        "--growth.max-batch-size: expected at least": ({"test": "norm", "max_batch_size": 50}, {}),
        "--growth.stages: expected sizes above": ({"stages": ("5=100",)}, {}),
        "--growth.test norm: expected --noise-scale.every-steps": (
            {"test": "norm"},
            {"noise_scale": NoiseScaleConfig(every_steps=0)},
        ),
        "--growth.test augmented: expected gradients as they are": (
            {"test": "augmented"},
            {"noise_scale": NoiseScaleConfig(preconditioned=True)},
        ),
    }
    for message, (growth, changes) in cases.items():
        with pytest.raises(ValueError, match=message):
            Trainer(make_dlrm(click_log), click_log, config_of(BatchGrowthConfig(**growth), **changes), tmp_path / "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_batch_size": 700},
            "--growth.max-batch-size: expected --growth.instead-of-decay or --growth.test norm or",
        ),
        ({"rewarm_samples": 100}, "--growth.rewarm-samples: expected a way of growing, as --growth.stages, beside it"),
        ({"rescale_states": False}, "--growth.rescale-states: expected a way of growing"),
        (
            {"stages": ("200=400",), "max_batch_size": 700},
            "--growth.max-batch-size: expected --growth.instead-of-decay",
        ),
        ({"stages": ("200=400",), "round_to": 7}, "--growth.round-to: expected --growth.instead-of-decay or"),
        (
            {"test": "norm", "orthogonality_tolerance": 0.3},
            "--growth.orthogonality-tolerance: expected --growth.test aug",
        ),
        ({"instead_of_decay": True}, "--growth.instead-of-decay: expected a --dense-schedule that decays"),
    ],
)
def test_refuses_what_would_do_nothing(settings: dict[str, Any], message: str, config_of) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(BatchGrowthConfig(**settings))


def test_refuses_a_rule_beside_growth_instead_of_decay(config_of) -> None:
    growth, schedule = BatchGrowthConfig(instead_of_decay=True), Schedule(decay_samples=1000)
    for rule in ({"rule": "sqrt"}, {"rule": "adascale", "scale_from": 50}):
        with pytest.raises(ValueError, match=r"--growth.instead-of-decay: expected no --rule beside it"):
            config_of(growth, dense_schedule=schedule, **rule)
    assert config_of(growth, dense_schedule=schedule, rule="sqrt", scale_from=50).rule == "sqrt"  # of the beginning


def test_says_when_nothing_will_grow(click_log, make_dlrm, tmp_path: Path, capsys, config_of) -> None:
    schedule = Schedule(hold_samples=10**6, decay_samples=100)
    late = {"growth": BatchGrowthConfig(instead_of_decay=True), "dense_schedule": schedule}
    full = {"growth": BatchGrowthConfig(test="norm", max_batch_size=100)}
    for changes, said in ((late, "--growth.instead-of-decay: no batch grows"), (full, "as large as it may be")):
        Trainer(make_dlrm(click_log), click_log, config_of(**changes), tmp_path / said[:5])
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_stages_may_be_written_with_underscores() -> None:
    assert parse_stages(("1_000=2_048", "5000=4096")) == [(1000, 2048), (5000, 4096)]

"""Flags that would change nothing are refused by name when a run starts, and what runs of before were told is read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from contrastive.asynchronous import SERVED_SEQUENCES
from contrastive.config import SequenceRunConfig
from contrastive.recipes import RECIPES
from contrastive.recommender import read_config
from contrastive.run_checks import check_start
from deploy.cli import main
from dlrm.optim.lr_schedules import Schedule
from dlrm.training.batch_growth_config import BatchGrowthConfig

SECOND_ORDER = {"mclrec.second_order": True}
MEMORY = {"mclrec.contrast": "memory", "mclrec.views_weight": 0.1, "mclrec.memory_size": 1024}
AUGMENTERS = {"mclrec.contrast": "augmenters"}
OWN = {"encoder.kind": "my.own:Encoder", "encoder.alpha": 0.5, "encoder.gru_width": 8, "encoder.heads": 4}


def change(recipe: str, settings: dict[str, Any]) -> SequenceRunConfig:
    """Return the configuration of a recipe with other values for groups' fields, as flags make it."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    config = RECIPES[recipe].config
    return replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in groups.items()})


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("sasrec", {"mclrec.views_weight": 5.0}, "--mclrec.contrast augmenters, views or memory"),
        ("sasrec", {"sequence.crop": 0.3}, "--mclrec.contrast augmenters, views or memory"),
        ("sasrec", {"sequence.second_view": "same_target"}, "--mclrec.contrast augmenters, views or memory"),
        ("sasrec", {"sequence.operators": ("mask",)}, "--mclrec.contrast augmenters, views or memory"),
        ("mclrec-toys", {"mclrec.contrast": "none", "mclrec.beta": 0.2}, "--mclrec.contrast augmenters"),
        ("cl4srec", {"mclrec.beta": 0.2}, "--mclrec.contrast augmenters"),
        ("cl4srec", {"mclrec.form": "joint"}, "--mclrec.contrast augmenters"),
        ("cl4srec", {"mclrec.memory_size": 512}, "--mclrec.contrast memory"),
        ("mclrec", {"mclrec.temperature": 0.5}, "--mclrec.views-weight"),
        ("mclrec", {"mclrec.similarity": "cosine"}, "--mclrec.views-weight"),
        ("mclrec", {"mclrec.regulariser_weight": 0.2, "mclrec.regulariser": "none"}, "--mclrec.regulariser code or"),
        ("mclrec", {"mclrec.virtual_rate": 0.1}, "--mclrec.second-order"),
        ("mclrec", {"sequence.crop": 0.3, "sequence.operators": ("mask",)}, "--sequence.operators with crop"),
        ("mclrec", {"sequence.negatives_power": 0.5, "sequence.negatives": 0}, "--sequence.negatives above 0"),
        ("sasrec", {"encoder.alpha": 0.5}, "--encoder.kind bsarec"),
        ("sasrec", {"encoder.gru_width": 64}, "--encoder.kind gru4rec"),
        ("sasrec", {"encoder.heads": 1, "encoder.kind": "gru4rec"}, "--encoder.kind sasrec or bsarec"),
        ("sasrec", {"encoder.positions": "newest", "encoder.kind": "gru4rec"}, "--encoder.kind sasrec or bsarec"),
        ("sasrec", {"noise_scale.decay": 0.5}, "a recipe for clicks"),
    ],
)
def test_what_would_change_nothing_is_refused(recipe: str, settings: dict[str, Any], expected: str) -> None:
    config = change(recipe, settings)
    with pytest.raises(ValueError, match=rf"^--[\w.-]+: expected {expected}.* beside it, as .* does nothing") as caught:
        check_start(config, RECIPES[recipe].config)
    flag = next(iter(settings)) if not next(iter(settings)).endswith("contrast") else "mclrec.beta"
    assert str(caught.value).startswith(f"--{flag.replace('_', '-')}: ")
    assert read_config(json.loads(json.dumps(asdict(config), default=str)), Path("run")) == config


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        *((recipe, {}) for recipe in RECIPES),
        ("mclrec-toys", {"mclrec.contrast": "none"}),  # with weights that the recipe says, and no user
        ("mclrec-sports", {"mclrec.contrast": "views", "mclrec.temperature": 0.2, "mclrec.similarity": "cosine"}),
        ("cl4srec", {**AUGMENTERS, "mclrec.beta": 0.2, "mclrec.regulariser": "none"}),
        ("mclrec", {**SECOND_ORDER, "mclrec.virtual_rate": 0.1}),
        ("mclrec", {**MEMORY, "mclrec.temperature": 0.2}),
        ("mclrec", {"sequence.operators": ("my.own:Insert", "crop"), "sequence.crop": 0.2}),
        ("bsarec", {"encoder.alpha": 0.5, "encoder.heads": 1}),
        ("sasrec", OWN),
    ],
)
def test_what_has_an_effect_is_not(recipe: str, settings: dict[str, Any]) -> None:
    check_start(change(recipe, settings), RECIPES[recipe].config)


def test_a_memory_smaller_than_the_largest_batch_is_refused() -> None:
    recipe = RECIPES["mclrec"].config
    first = change("mclrec", MEMORY | {"step.global_batch_size": 513})
    with pytest.raises(ValueError, match=r"^--mclrec\.memory-size: expected at least 1026, .*--step\.global-batch"):
        check_start(first, recipe)
    config = replace(change("mclrec", MEMORY), growth=BatchGrowthConfig(stages=("1000=512", "5000=600")))
    with pytest.raises(
        ValueError, match=r"^--mclrec\.memory-size: expected at least 1200, .*--growth\.stages.*got 1024"
    ):
        check_start(config, recipe)
    check_start(replace(config, growth=BatchGrowthConfig(stages=("1000=512",))), recipe)


def test_a_second_order_step_takes_what_it_needs() -> None:
    assert change("mclrec", SECOND_ORDER).encoder.kernels == "torch"
    assert change("mclrec", {}).encoder.kernels == "auto"
    with pytest.raises(ValueError, match=r"^--mclrec\.second-order: expected one process, got --ranks 2"):
        replace(change("mclrec", SECOND_ORDER), ranks=2)
    config = SERVED_SEQUENCES.default(change("mclrec", SECOND_ORDER))
    with pytest.raises(ValueError, match=r"^--mclrec\.second-order: expected one process, got parameter servers"):
        SERVED_SEQUENCES.check(config)


def test_commands_refuse_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", str(tmp_path), "--mclrec.views-weight", "5", "--output", str(tmp_path / "run")]
    for command in (["train"], ["ps", "up"]):
        assert main([*command, "sasrec", *flags]) == 2
        assert "recforge: error: --mclrec.views-weight: expected --mclrec.contrast" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rates_of_the_beauty_recipe_fall_after_28_epochs() -> None:
    config = RECIPES["mclrec-beauty"].config
    for schedule in (config.dense_schedule, config.tables_schedule):
        epochs = {epoch: schedule.factor(epoch * 131_413) for epoch in (0, 28, 31, 34)}
        assert epochs == pytest.approx({0: 1.0, 28: 1.0, 31: 0.505, 34: 0.01})


def test_a_run_of_another_length_than_its_recipe_is_told_how_to_stretch_the_rates(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, plain = RECIPES["mclrec-beauty"], RECIPES["mclrec"]
    half = replace(recipe.config, epochs=17.0)
    one = replace(half, tables_schedule=Schedule(shape="0.5"))
    own = replace(one, dense_schedule=Schedule(shape="0.5"))
    for of, config, rows in ((recipe, recipe.config, 131_413), (recipe, own, 131_413), (plain, plain.config, 7)):
        of.tell_doubt(config, rows)
        assert capsys.readouterr().err == ""
    shape = "'cosine(394_239, start=1_839_782, end=0.01)'"
    for config, schedules in ((half, ("tables", "dense")), (one, ("dense",))):
        recipe.tell_doubt(config, 131_413)
        flags = " ".join(f"--{schedule}-schedule.shape {shape}" for schedule in schedules)
        assert capsys.readouterr().err.endswith(f"and this run has 17 of 131,413; its own would be {flags}\n")


def test_a_recipe_for_other_data_says_so_when_it_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").write_text("".join(f"{user} 1 2 3 {user % 5 + 4}\n" for user in range(40)))
    flags = ["--data", str(tmp_path / "log.txt"), "--output", str(tmp_path / "run"), "--step.threads", "1"]
    assert main(["train", "mclrec-beauty", *flags, "--epochs", "1"]) == 0
    assert "for 34 epochs of 131,413 samples, and this run has 1 of 40; its own would be" in capsys.readouterr().err

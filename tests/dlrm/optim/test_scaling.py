"""A configuration scaled to another batch: every number by its rule, printed before and after, doubts in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlrm.cli import parse
from dlrm.config import (
    CheckpointConfig,
    EvaluationConfig,
    RunConfig,
    SmallTablesConfig,
    StepConfig,
    TablesConfig,
    TrainingConfig,
)
from dlrm.data.dataset import Dataset
from dlrm.optim.config import DenseOptimizerConfig, HeadConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.plateau import PlateauConfig
from dlrm.optim.scaling import follow_batch_size, scale_config
from dlrm.optim.scaling_text import describe_changes, find_doubts
from dlrm.recipes import RECIPES, Recipe
from dlrm.training import command, kind
from dlrm.training.batch_growth_config import BatchGrowthConfig

SMALL = RunConfig(
    epochs=2,
    scale_from=1024,
    dense=DenseOptimizerConfig(name="adam", learning_rate=1e-3, weight_decay=0.01),
    head=HeadConfig(learning_rate=5e-4),
    tables=TablesConfig(optimizer="adam", learning_rate=1e-4, weight_decay=1e-5),
    dense_schedule=Schedule(warmup_samples=1000, hold_samples=2000, decay_samples=7000),
    tables_schedule=Schedule(shape="warmup(500) * cosine(10_000)"),
    step=StepConfig(global_batch_size=16 * 1024),
    evaluation=EvaluationConfig(every_samples=5000),
)


def _scale(**changes: Any) -> RunConfig:
    return scale_config(replace(SMALL, **changes))[0]


def test_without_a_base_nothing_is_scaled() -> None:
    config = replace(SMALL, scale_from=None)
    assert scale_config(config) == (config, ())


def test_the_same_batch_changes_nothing() -> None:
    for rule in ("none", "linear", "sqrt", "power", "sde", "legw", "adascale", "cowclip", "auto"):
        for match in ("epochs", "updates"):
            config = replace(SMALL, scale_from=16 * 1024, rule=rule, match=match)
            scaled, changes = scale_config(config)
            assert scaled == config
            assert {change.reason for change in changes} == {""}


def test_sqrt_scales_every_rate() -> None:
    scaled = _scale(rule="sqrt")
    rates = [scaled.dense.learning_rate, scaled.head.learning_rate, scaled.tables.learning_rate]
    assert rates == pytest.approx([4e-3, 2e-3, 4e-4])
    kept = replace(scaled, dense=SMALL.dense, head=SMALL.head, tables=SMALL.tables, rule=None)
    assert kept == SMALL


def test_a_group_may_have_a_rule_of_its_own() -> None:
    scaled = _scale(rule="sqrt", rules=("head=none", "tables=linear"))
    rates = [scaled.dense.learning_rate, scaled.head.learning_rate, scaled.tables.learning_rate]
    assert rates == pytest.approx([4e-3, 5e-4, 16e-4])
    follow = follow_batch_size(replace(scaled, rules=("head=none", "tables=linear")))
    assert [follow(4 * 16 * 1024, group) for group in ("dense", "head", "tables")] == pytest.approx([2.0, 1.0, 4.0])
    # A head without a rate of its own is given one where its rule is another than the dense part's, and only there.
    assert _scale(rule="sqrt", head=HeadConfig(), rules=("head=none",)).head.learning_rate == pytest.approx(1e-3)
    assert _scale(rule="sqrt", head=HeadConfig()).head.learning_rate is None


@pytest.mark.parametrize("text", ["towers=sqrt", "head=cubic", "head=adascale", "head"])
def test_rules_of_other_groups_or_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--rules: expected GROUP=RULE with a group of dense, .*, got {text}$"):
        RunConfig(scale_from=10, rules=(text,))


def test_a_rule_of_a_group_wants_a_base_too() -> None:
    with pytest.raises(ValueError, match="--scale-from: expected beside --rules head=sqrt the batch size"):
        RunConfig(rules=("head=sqrt",))


def test_linear_and_power_go_both_ways() -> None:
    assert _scale(rule="linear", scale_from=32 * 1024).dense.learning_rate == pytest.approx(5e-4)
    assert _scale(rule="power", rule_power=0.75).tables.learning_rate == pytest.approx(8e-4)


def test_cowclip_scales_by_group() -> None:
    scaled = _scale(rule="cowclip")
    assert (scaled.dense.learning_rate, scaled.dense.weight_decay) == (pytest.approx(4e-3), 0.01)
    assert (scaled.tables.learning_rate, scaled.tables.weight_decay) == (1e-4, pytest.approx(16e-5))


def test_sde_writes_out_what_was_left_to_the_optimizer() -> None:
    scaled = _scale(rule="sde", scale_from=8 * 1024)
    assert scaled.dense.betas == pytest.approx((0.8, 0.998))
    assert scaled.dense.eps == pytest.approx(1e-8 / 2**0.5)
    assert scaled.tables.betas == pytest.approx((0.8, 0.998))
    assert _scale(rule="sde").dense.betas == pytest.approx((0.0, 0.984))  # 1 - 16 * .1 would be below 0
    sgd = DenseOptimizerConfig(name="sgd", learning_rate=1.0)
    assert _scale(rule="sde", dense=sgd).dense == replace(sgd, learning_rate=16.0)


def test_auto_lets_rare_rows_be_and_takes_small_tables_for_dense_weights() -> None:
    scaled = _scale(small_tables=SmallTablesConfig(below_rows=100))
    assert (scaled.tables.learning_rate, scaled.tables.eps) == (1e-4, pytest.approx(1e-8 / 16))
    small = scaled.small_tables.resolve(scaled.tables)
    assert (small.learning_rate, small.eps) == (pytest.approx(4e-4), scaled.tables.eps)
    assert scaled.small_tables == SmallTablesConfig(below_rows=100, learning_rate=small.learning_rate)


def test_small_tables_of_their_own_are_scaled_by_what_they_are() -> None:
    small = SmallTablesConfig(below_rows=100, optimizer="cowclip", learning_rate=1e-3, l2=1e-4)
    scaled, changes = scale_config(replace(SMALL, rule="cowclip", small_tables=small))
    assert (scaled.small_tables.learning_rate, scaled.small_tables.l2) == (1e-3, pytest.approx(16e-4))
    assert [(c.before, c.after) for c in changes if c.flag == "--small-tables.l2"] == [(1e-4, pytest.approx(16e-4))]
    sgd = SmallTablesConfig(below_rows=100, optimizer="sgd", learning_rate=1.0)
    assert _scale(small_tables=sgd).small_tables.learning_rate == pytest.approx(8 * 2**0.5)
    unscaled = SmallTablesConfig(below_rows=100)
    assert _scale(rule="sqrt", small_tables=unscaled).small_tables == unscaled  # they follow the others


def test_legw_keeps_the_steps_of_a_warmup_and_the_end_of_the_schedule() -> None:
    scaled = _scale(rule="legw", scale_from=4 * 1024)
    schedule = scaled.dense_schedule
    assert (schedule.warmup_samples, schedule.hold_samples, schedule.decay_samples) == (4000, 0, 6000)
    assert scaled.tables_schedule.shape == "warmup(2_000) * cosine(10_000)"
    assert _scale(rule="legw").dense_schedule.warmup_samples == 16_000
    shorter = _scale(rule="legw", scale_from=32 * 1024).dense_schedule
    assert (shorter.warmup_samples, shorter.hold_samples, shorter.decay_samples) == (500, 2500, 7000)


def test_lamb_warms_up_for_as_many_steps_but_no_longer_than_a_fifth() -> None:
    lamb = DenseOptimizerConfig(name="lamb", learning_rate=0.01)
    for rule in ("sqrt", "auto"):
        schedule = _scale(rule=rule, dense=lamb).dense_schedule
        assert (schedule.warmup_samples, schedule.hold_samples, schedule.decay_samples) == (2000, 1000, 7000)
        open_end = _scale(rule=rule, dense=lamb, dense_schedule=Schedule(warmup_samples=1000)).dense_schedule
        assert open_end.warmup_samples == 16_000
    long = Schedule(warmup_samples=5000, decay_samples=5000)
    assert _scale(rule="sqrt", dense=lamb, dense_schedule=long).dense_schedule == long


def test_matched_updates_make_all_lengths_longer() -> None:
    scaled = _scale(rule="sqrt", match="updates", checkpoint=CheckpointConfig(every_samples=700))
    assert (scaled.epochs, scaled.evaluation.every_samples, scaled.checkpoint.every_samples) == (32, 80_000, 11_200)
    for samples in (0, 300, 900, 4321, 9000):
        for name in ("dense_schedule", "tables_schedule"):
            before, after = getattr(SMALL, name), getattr(scaled, name)
            assert after.factor(16 * samples) == pytest.approx(before.factor(samples))
    assert _scale(rule="legw", match="updates").dense_schedule == scaled.dense_schedule  # not k * k


def test_matched_updates_move_what_depends_on_samples_elsewhere() -> None:
    growth = BatchGrowthConfig(stages=("1_000_000=32768", "3000000=65536"), rewarm_samples=10_000)
    plateau = PlateauConfig(policy="change", shapes=("cosine(100_000)", "1"))
    config = replace(SMALL, match="updates", growth=growth, plateau=plateau)
    scaled, changes = scale_config(config)
    assert scaled.growth.stages == ("16000000=32768", "48000000=65536")
    assert scaled.growth.rewarm_samples == 160_000
    assert scaled.plateau == replace(plateau, shapes=("cosine(1_600_000)", "constant(1)"))
    told = {change.flag: (change.before, change.after) for change in changes}
    assert told["--growth.rewarm-samples"] == (10_000, 160_000)
    assert told["--plateau.shapes"] == (plateau.shapes, scaled.plateau.shapes)
    assert told["--growth.stages"] == (growth.stages, scaled.growth.stages)
    kept = scale_config(replace(config, match="epochs"))[0]
    assert (kept.growth, kept.plateau) == (growth, plateau)


def test_a_loop_without_tables_is_scaled_too() -> None:
    config = TrainingConfig(scale_from=1024, rule="linear", step=StepConfig(global_batch_size=2048))
    scaled, changes = scale_config(config)
    assert scaled.dense.learning_rate == pytest.approx(0.01)
    assert "--dense.learning-rate" in [change.flag for change in changes]


def test_the_table_tells_every_number_before_and_after() -> None:
    scaled, changes = scale_config(replace(SMALL, rule="cowclip"))
    headline, _, *lines = describe_changes(scaled, changes)
    assert headline == "batch size 1,024 -> 16,384 (k = 16), --rule cowclip, --match epochs"
    told = {line.split()[0]: line.split()[1:] for line in lines}
    assert told["--dense.learning-rate"] == ["0.001", "0.004", "sqrt(k)"]
    assert told["--tables.weight-decay"][:2] == ["1e-05", "0.00016"]
    assert told["--tables.learning-rate"] == ["0.0001", "0.0001", "unchanged"]
    assert told["--dense-schedule.warmup-samples"] == ["1,000", "1,000", "unchanged"]
    assert {"--head.learning-rate", "--dense.weight-decay", "--epochs", "--evaluation.every-samples"} <= told.keys()
    assert describe_changes(SMALL, ()) == []
    sde = describe_changes(*scale_config(replace(SMALL, rule="sde")))
    assert any(line.split()[:4] == ["--dense.betas", "0.9,", "0.999", "0,"] for line in sde)


@pytest.mark.parametrize(
    ("changes", "doubts"),
    [
        ({}, []),
        ({"scale_from": 64}, []),
        ({"step": StepConfig(global_batch_size=16_384)}, ["122 updates are few: below about 1,500"]),
        ({"scale_from": 64, "rule": "linear"}, ["linear scaling is known to diverge"]),
        ({"scale_from": 64, "rule": "none"}, ["rates of the small batch learn too little"]),
        ({"scale_from": 64, "rule": "adascale"}, ["schedules advance by the measured gain"]),
        ({"scale_from": 64, "rule": "sde"}, ["a moment that forgets so much faster"]),
        ({"scale_from": 64, "epochs": 2, "match": "updates"}, ["32 epochs show every row the same samples"]),
        (
            {"dense_schedule": Schedule(warmup_samples=1_100_000)},
            ["the warm-up of --dense-schedule takes 1,100,000 of the run's 2,000,000 samples; shorten"],
        ),
        (
            {"tables_schedule": Schedule(shape="warmup(3e6)")},
            ["the warm-up of --tables-schedule takes 3,000,000 of the run's 2,000,000 samples, more than there are"],
        ),
    ],
)
def test_what_is_likely_to_hurt_is_said(changes: dict[str, Any], doubts: list[str]) -> None:
    base = replace(SMALL, epochs=1, rule="sqrt", step=StepConfig(global_batch_size=1024))
    told = find_doubts(scale_config(replace(base, **changes))[0], train_rows=2_000_000)
    assert [line[: len(start)] for line, start in zip(told, doubts, strict=True)] == doubts


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--rule", "sqrt"], "--scale-from: expected beside --rule sqrt the batch size that the numbers are for"),
        (["--match", "updates"], "--scale-from: expected beside --match updates"),
        (["--scale-from", "0"], "--scale-from: expected at least 1, got 0"),
        (["--scale-from", "64", "--rule", "root"], "--rule"),
    ],
)
def test_half_said_things_are_errors_of_one_line(flags: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse(RunConfig, flags, program="recforge train synthetic")
    assert "\n" not in str(caught.value)


def test_a_batch_that_changes_during_the_run_takes_a_rule_without_a_base() -> None:
    config = parse(RunConfig, ["--rule", "sqrt", "--growth.stages", "100000=8192"], program="recforge train synthetic")
    assert scale_config(config) == (config, ())
    adascale = ["--rule", "adascale", "--growth.stages", "100000=8192"]
    with pytest.raises(ValueError, match="--scale-from: expected beside --rule adascale"):
        parse(RunConfig, adascale, program="recforge train synthetic")


@pytest.mark.parametrize("given", [["--global-batch-size", "512"], ["--global_batch_size=512"]])
def test_the_batch_size_has_a_short_flag(given: list[str]) -> None:
    config = parse(RunConfig, given, program="recforge train synthetic", short=kind.SHORT)
    assert config.step.global_batch_size == 512


def test_training_prints_the_table_and_the_doubts_and_keeps_the_scaled_numbers(
    click_log: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES["synthetic"]
    config = replace(
        recipe.config,
        data=click_log.folder,
        output=tmp_path / "run",
        scale_from=512,
        tables=TablesConfig(optimizer="adam", learning_rate=0.002),
        step=StepConfig(global_batch_size=2048, threads=1),
        time_limit_seconds=0.01,
    )
    command.train("synthetic", Recipe(help="", source="synthetic", config=config), config)
    told = capsys.readouterr().err
    assert "recforge: batch size 512 -> 2,048 (k = 4), --rule auto" in told
    assert "recforge: warning: 6 updates are few" in told
    assert "recforge: learning rate times 2, as some rows occur in every batch: " in told
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert written["scale_from"] == 512
    assert written["dense"]["learning_rate"] == recipe.config.dense.learning_rate * 2
    assert f"{click_log.info.features[0].name}=2.0" in written["tables"]["rates"]

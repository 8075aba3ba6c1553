"""The recipes for real rows train through the command line, on the split they promise, and learn what is to be learned.

The bounds lie below what every seed reaches (docs/results.md) and above what a part of the features gives. A recipe for
a large batch is that for a small one with other numbers, and those alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.cli import main
from dlrm.config import ModelConfig, RunConfig, SmallTablesConfig, StepConfig, TablesConfig
from dlrm.data.synthetic import SyntheticConfig, generate
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.recipes import DENSE_WARMUP_STEPS, ROW_EPS_SAMPLES, ROW_LENGTH, ROW_RATE, TABLES_WARMUP_STEPS, large_batch


@pytest.mark.parametrize(
    ("recipe", "place", "test_rows", "least_auc"),
    [
        ("criteo-kaggle-sample", "criteo_kaggle/train_head_10000.tsv", 2_000, 0.72),
        ("movielens-100k", "ml-100k", 20_001, 0.69),
    ],
)
def test_recipe_on_real_rows(
    recipe: str,
    place: str,
    test_rows: int,
    least_auc: float,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # prepared data goes under ./datasets
    run = tmp_path / "run"
    flags = ["--data", str(shared_data / place), "--output", str(run), "--seed", "3", "--step.threads", "1"]
    assert main(["train", recipe, *flags]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["split"], summary["split_samples"]) == ("test", test_rows)
    config = json.loads((run / "config.json").read_text())
    # The whole training part, in each of the epochs that the recipe fixes: there is no valid split to stop by.
    trained_rows = 8_000 if recipe == "criteo-kaggle-sample" else 79_999
    assert summary["samples"] == config["epochs"] * trained_rows
    assert summary["auc"] > least_auc
    assert 0.9 < summary["calibration"] < 1.1


SMALL = RunConfig(
    seed=5,
    model=ModelConfig(dim=4),
    dense=DenseOptimizerConfig(name="adam", learning_rate=0.003),
    dense_schedule=Schedule(warmup_samples=10_000, decay_samples=990_000, end_factor=0.1),
    tables=TablesConfig(learning_rate=0.9, eps=0.016, init_scale=0.2, row_type="bf16"),
    tables_schedule=Schedule(warmup_samples=400_000, decay_samples=600_000),
    step=StepConfig(global_batch_size=256, threads=1),
)


def test_large_batch_changes_what_goes_with_the_batch_and_nothing_else() -> None:
    large = large_batch(SMALL, 4096)
    assert large.step == replace(SMALL.step, global_batch_size=4096)
    assert large.dense == replace(SMALL.dense, learning_rate=0.003 * 4)
    assert large.tables == replace(SMALL.tables, eps=0.016 / 16)
    # as many steps of warm-up as it takes, unless there are more already, out of the samples of the decay
    warmup = DENSE_WARMUP_STEPS * 4096
    assert large.dense_schedule == replace(
        SMALL.dense_schedule, warmup_samples=warmup, decay_samples=1_000_000 - warmup
    )
    assert large.tables_schedule == SMALL.tables_schedule
    # so that `recforge train` does not scale it again
    assert (large.scale_from, large.rule) == (None, None)
    changed = {name for name in vars(SMALL) if getattr(large, name) != getattr(SMALL, name)}
    assert changed == {"step", "dense", "tables", "dense_schedule"}


def test_large_batch_gives_rows_an_optimizer_whose_rate_and_eps_are_known() -> None:
    adam = replace(SMALL, tables=TablesConfig(optimizer="adam", learning_rate=0.02, init_scale=0.1, row_type="bf16"))
    tables = large_batch(adam, 8192).tables
    assert (tables.optimizer, tables.learning_rate, tables.eps) == ("rowwise_adagrad", ROW_RATE, ROW_EPS_SAMPLES / 8192)
    assert tables.row_type == "bf16"
    # uniform in +-s, 4 numbers: E ||row|| ** 2 = 4 * s ** 2 / 3
    assert 4 * tables.init_scale**2 / 3 == pytest.approx(ROW_LENGTH**2)
    assert tables.init_scale > 0.1


def test_large_batch_takes_no_numbers_over_from_an_optimizer_that_is_replaced() -> None:
    tables = TablesConfig(optimizer="adam", learning_rate=0.001, weight_decay=1e-5, rates=("user=0.1",))
    adam = replace(SMALL, tables=tables)
    for small in (
        SmallTablesConfig(below_rows=2048),
        SmallTablesConfig(below_rows=2048, betas=(0.9, 0.99)),
        SmallTablesConfig(below_rows=2048, optimizer="adam", learning_rate=0.002),
    ):
        large = large_batch(replace(adam, small_tables=small), 4096)
        assert large.small_tables == SmallTablesConfig(below_rows=2048)
        assert large.small_tables.resolve(large.tables) == large.tables
        assert (large.tables.rates, large.tables.learning_rate) == (("user=0.1",), ROW_RATE)
        assert large.tables.weight_decay > 0
    kept = replace(SMALL, small_tables=SmallTablesConfig(below_rows=2048, learning_rate=0.3))
    assert large_batch(kept, 4096).small_tables.learning_rate is not None


def test_large_batch_warms_up_for_half_of_a_short_schedule_at_most() -> None:
    short = replace(SMALL, tables_schedule=Schedule(decay_samples=100_000), dense_schedule=Schedule())
    large = large_batch(short, 4096)
    assert TABLES_WARMUP_STEPS * 4096 > 50_000
    assert large.tables_schedule == Schedule(warmup_samples=50_000, decay_samples=50_000)
    assert large.dense_schedule == Schedule(warmup_samples=DENSE_WARMUP_STEPS * 4096)


def test_large_batch_refuses_what_is_to_be_scaled_by_a_flag() -> None:
    with pytest.raises(ValueError, match="expected a configuration without scale_from, got scale_from=128"):
        large_batch(replace(SMALL, scale_from=128), 4096)


def test_recipe_large_batch_trains(tmp_path: Path) -> None:
    log = generate(SyntheticConfig(num_train=30_000, num_valid=1_000, num_test=2_000, max_ids=300), tmp_path / "log")
    run = tmp_path / "run"
    flags = ["--data", str(log.folder), "--output", str(run), "--step.threads", "1"]
    assert main(["train", "large-batch", *flags, "--guards.chance-evaluations", "0"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert config["step"]["global_batch_size"] == 4096
    assert config["tables"]["optimizer"] == "rowwise_adagrad"
    assert config["tables_schedule"]["warmup_samples"] == TABLES_WARMUP_STEPS * 4096
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["samples"], summary["split"]) == (30_000, "test")

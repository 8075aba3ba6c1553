"""Flags of tables: what an optimizer does not read is refused by name; small tables differ only where told to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from dlrm.config import RunConfig, SmallTablesConfig, TablesConfig
from dlrm.data.dataset import DatasetInfo, FeatureInfo
from dlrm.descriptions import describe_row_optimizer, describe_tables
from dlrm.optim.lr_schedules import Schedule
from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ({}, RowWiseAdagrad(learning_rate=0.05)),
        ({"optimizer": "sgd", "weight_decay": 0.1}, RowSGD(learning_rate=0.05, weight_decay=0.1)),
        ({"optimizer": "adagrad", "eps": 0.1}, RowAdagrad(learning_rate=0.05, eps=0.1)),
        ({"optimizer": "adam", "betas": (0.5, 0.9)}, RowAdam(learning_rate=0.05, betas=(0.5, 0.9))),
        ({"optimizer": "lamb"}, RowLamb(learning_rate=0.05)),
        (
            {"optimizer": "partial_lamb", "trust": "table", "weight_decay": 0.1},
            RowLamb(learning_rate=0.05, partial=True, trust="table", weight_decay=0.1),
        ),
        ({"optimizer": "cowclip"}, RowCowClip(learning_rate=0.05)),
        (
            {"optimizer": "cowclip", "clip": 2.0, "zeta": 1e-4, "l2": 0.1, "l2_mode": "lazy", "eps": 0.2},
            RowCowClip(learning_rate=0.05, clip=2.0, zeta=1e-4, l2=0.1, l2_mode="lazy", eps=0.2),
        ),
    ],
)
def test_flags_describe_a_row_optimizer(settings, described):
    assert describe_row_optimizer(TablesConfig(**settings)) == described


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "sgd", "eps": 0.1}, "--tables.eps: expected no value with --tables.optimizer sgd, got 0.1"),
        (
            {"betas": (0.9, 0.9)},
            r"--tables.betas: expected no value with --tables.optimizer rowwise_adagrad, got \(0.9",
        ),
        ({"optimizer": "adam", "trust": "row"}, "--tables.trust: expected no value with --tables.optimizer adam"),
        ({"optimizer": "adam", "clip": 1.0}, "--tables.clip: expected no value with --tables.optimizer adam, got 1.0"),
        ({"l2_mode": "lazy"}, "--tables.l2-mode: expected no value with --tables.optimizer rowwise_adagrad, got lazy"),
        (
            {"optimizer": "cowclip", "weight_decay": 0.1},
            "--tables.weight-decay: expected no value with --tables.optimizer cowclip, got 0.1",
        ),
        ({"learning_rate": -1.0}, "--tables.learning-rate: expected a number >= 0, got -1.0"),
        ({"eps": float("nan")}, "--tables.eps: expected a number >= 0, got nan"),
        ({"optimizer": "cowclip", "zeta": 0.0}, "--tables.zeta: expected a number > 0, got 0.0"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, r"--tables.betas: expected two numbers in \[0, 1\), got \(0.9, 1"),
        ({"optimizer": "lion"}, "--tables.optimizer: expected one of rowwise_adagrad, .*, cowclip, got lion"),
        ({"optimizer": "lamb", "trust": "all"}, "--tables.trust: expected one of row, touched, table, got all"),
    ],
)
def test_what_is_not_read_or_out_of_range_is_refused(settings, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        TablesConfig(**settings)


ADAM = TablesConfig(optimizer="adam", learning_rate=0.1, eps=0.3, betas=(0.5, 0.6), weight_decay=0.2, init_scale=0.4)


@pytest.mark.parametrize(
    ("small", "changed"),
    [
        ({}, {}),
        ({"learning_rate": 0.7, "weight_decay": 0.0}, {"learning_rate": 0.7, "weight_decay": 0.0}),
        ({"optimizer": "adam", "eps": 0.5, "init_scale": 1.0}, {"eps": 0.5, "init_scale": 1.0}),
        (
            {"optimizer": "lamb", "learning_rate": 0.01, "trust": "table"},
            {"optimizer": "lamb", "learning_rate": 0.01, "trust": "table", "eps": None, "betas": None},
        ),
        (
            {"optimizer": "cowclip", "learning_rate": 0.01, "l2": 0.1},
            {"optimizer": "cowclip", "learning_rate": 0.01, "l2": 0.1, "eps": None, "betas": None, "weight_decay": 0.0},
        ),
    ],
)
def test_small_tables_take_over_what_they_are_not_told(small, changed):
    assert SmallTablesConfig(below_rows=9, **small).resolve(ADAM) == replace(ADAM, **changed)


@pytest.mark.parametrize(
    ("small", "said"),
    [
        ({"below_rows": -1}, "--small-tables.below-rows: expected at least 0, got -1"),
        ({"eps": 0.1}, "--small-tables.eps: expected --small-tables.below-rows above 0 beside it, got 0"),
        (
            {"below_rows": 9, "optimizer": "lamb"},
            "--small-tables.learning-rate: expected a number beside the optimizer lamb, got none",
        ),
        (
            {"below_rows": 9, "trust": "table"},
            "--small-tables.trust: expected no value with --small-tables.optimizer adam, got table",
        ),
        ({"below_rows": 9, "l2": -0.1}, "--small-tables.l2: expected a number >= 0, got -0.1"),
    ],
)
def test_small_tables_that_make_no_sense_are_refused_before_anything_is_built(small, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        RunConfig(tables=ADAM, small_tables=SmallTablesConfig(**small))


def test_tables_with_fewer_rows_are_small():
    features = tuple(FeatureInfo(name=f"f{rows}", num_rows=rows) for rows in (9, 10, 11))
    info = DatasetInfo(numeric=(), features=features, splits={})
    small = SmallTablesConfig(below_rows=10, optimizer="lamb", learning_rate=0.01, trust="table")
    described = describe_tables(info, 4, ADAM, small)
    assert [config.group for config in described] == ["small_tables", "tables", "tables"]
    assert described[0].optimizer == RowLamb(learning_rate=0.01, trust="table", weight_decay=0.2)
    assert {config.optimizer for config in described[1:]} == {
        RowAdam(learning_rate=0.1, eps=0.3, betas=(0.5, 0.6), weight_decay=0.2)
    }
    assert {config.group for config in describe_tables(info, 4, ADAM)} == {"tables"}


def test_configuration_needs_no_torch():
    code = "import sys; import dlrm.config, dlrm.tables_config, dlrm.descriptions; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert asdict(RunConfig())["small_tables"]["below_rows"] == 0


def test_a_schedule_of_small_tables_wants_some() -> None:
    schedule = Schedule(decay_samples=9)
    assert RunConfig(small_tables_schedule=schedule, small_tables=SmallTablesConfig(below_rows=9))
    with pytest.raises(ValueError, match=r"expected --small-tables\.below-rows beside it"):
        RunConfig(small_tables_schedule=schedule)

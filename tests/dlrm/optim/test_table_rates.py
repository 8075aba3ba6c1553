"""Tables have rates of their own: as they were given, or by how often the data name their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dlrm.config import RunConfig, SmallTablesConfig, StepConfig, TablesConfig
from dlrm.data.dataset import Dataset
from dlrm.descriptions import describe_tables
from dlrm.optim.scaling import scale_config
from dlrm.optim.table_rates import rate_tables
from dlrm.planning.statistics import measure_top_shares

CONFIG = RunConfig(
    scale_from=1024,
    step=StepConfig(global_batch_size=16 * 1024),
    tables=TablesConfig(optimizer="adam", learning_rate=0.001),
)
ROWS = {"user": 10**6, "item": 10**5, "hour": 24}
SHARES = {"user": 1e-5, "item": 0.01, "hour": 0.1}


def _rates(config: RunConfig) -> dict[str, str]:
    rated, _ = rate_tables(scale_config(config)[0], ROWS, SHARES)
    return dict(text.split("=") for text in rated.tables.rates)


def test_frequent_rows_are_scaled_as_dense_weights_wherever_they_are() -> None:
    assert _rates(CONFIG) == {"item": "4.0", "hour": "4.0"}
    rated, lines = rate_tables(scale_config(CONFIG)[0], ROWS, SHARES)
    assert lines == ["learning rate times 4, as some rows occur in every batch: item, hour"]
    assert rated.tables.learning_rate == 0.001


def test_a_small_table_is_frequent_already_unless_it_is_not() -> None:
    small = replace(CONFIG, small_tables=SmallTablesConfig(below_rows=2048))
    assert _rates(small) == {"item": "4.0"}
    rated, lines = rate_tables(scale_config(small)[0], ROWS, SHARES | {"hour": 1e-6, "item": 1e-6})
    assert rated.tables.rates == ("hour=0.25",)
    assert lines == ["learning rate times 0.25, as no row occurs in every batch: hour"]


def test_rates_that_were_given_are_kept_and_multiplied() -> None:
    given = replace(CONFIG, tables=replace(CONFIG.tables, rates=("user=0.5", "item=0.1")))
    assert _rates(given) == {"user": "0.5", "item": "0.4", "hour": "4.0"}


@pytest.mark.parametrize("changes", [{"rule": "sqrt"}, {"scale_from": None}, {"scale_from": 16 * 1024}])
def test_without_a_rule_that_asks_nothing_changes(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    assert rate_tables(config, ROWS, SHARES) == (config, [])


def test_a_rate_reaches_the_optimizer_of_its_table(click_log: Dataset) -> None:
    names = [feature.name for feature in click_log.info.features]
    config = TablesConfig(optimizer="adam", learning_rate=0.002, rates=(f"{names[1]}=0.5",))
    described = {table.name: table.optimizer.learning_rate for table in describe_tables(click_log.info, 4, config)}
    assert described == dict.fromkeys(names, 0.002) | {names[1]: 0.001}
    with pytest.raises(ValueError, match=rf"--tables.rates: expected names of tables \({names[0]}, .*, got nobody"):
        describe_tables(click_log.info, 4, replace(config, rates=("nobody=2",)))
    for wrong in ("user", "user=", "=2", "user=0", "user=-1", "user=nan", "user=x"):
        with pytest.raises(ValueError, match=r"--tables\.rates: expected NAME=FACTOR with a factor above 0, got"):
            TablesConfig(rates=(wrong,))


def test_the_share_of_the_most_frequent_row_is_counted(make_dataset: Callable[..., Dataset]) -> None:
    ids = np.array([3, 3, 3, 1, 2, 5, 5, 7])
    dataset = make_dataset(np.array([0, 1] * 4), ids)
    tables = describe_tables(dataset.info, 4, TablesConfig())
    assert measure_top_shares(dataset, tables) == {"a": 3 / 8}

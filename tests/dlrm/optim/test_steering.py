"""Each group of parameters and tables gets its own rate: base, schedules of its group, and what others multiply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlrm.config import StepConfig, TrainingConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.scaling import follow_batch_size
from dlrm.optim.steering import Schedules, Steering
from dlrm.training.batch_growth_config import BatchGrowthConfig
from embeddings import RowSGD, TableConfig
from embeddings.local.local_tables import LocalTables

SCHEDULES = Schedules(
    dense=Schedule(warmup_samples=100),
    head=Schedule(decay_samples=200),
    tables=Schedule(warmup_samples=1000),
    small_tables=Schedule(decay_samples=500),
)


def test_rates_are_products_of_what_holds_for_the_group() -> None:
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("dense", "head", "vectors")}
    rates = {"dense": 0.1, "head": 0.2, "vectors": 0.4}
    optimizer = torch.optim.SGD([{"params": [weights[name]], "lr": rates[name], "name": name} for name in rates], lr=1)
    groups = ("tables", "small_tables", "other")
    tables = [TableConfig(name=g, num_rows=9, dim=1, optimizer=RowSGD(learning_rate=2.0), group=g) for g in groups]
    held = LocalTables(tables)
    given: list[list[float]] = []
    held.set_learning_rate_factors = lambda factors: given.append(list(factors))  # type: ignore[method-assign]
    steering = Steering(optimizer, [held], SCHEDULES)
    for _ in range(2):  # a second time gives the same
        steering.set(50, 100, lambda group: 3.0 if group == "head" else 1.0)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({"dense": 0.05, "head": 0.2 * 0.5 * 0.75 * 3, "vectors": 0.2})
    assert given == [pytest.approx([0.05, 0.05 * 0.9, 0.05])] * 2
    assert steering.values() == pytest.approx({"dense_learning_rate": 0.05, "tables_learning_rate_factor": 0.05})


def test_rates_follow_the_batch_size_by_the_rule() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    config = TrainingConfig(
        step=StepConfig(global_batch_size=100),
        rule="sqrt",
        growth=BatchGrowthConfig(stages=("1000=400",)),
    )
    steering = Steering(optimizer, [], rule=follow_batch_size(config))
    rates = []
    for size in (100, 400, 100):
        steering.set(0, size)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.1])
    decay, stages = Schedule(decay_samples=1000), Schedule(shape="stages((1000, 100), (1000, 400, 0, 2))")
    of_schedule = {"growth": BatchGrowthConfig(instead_of_decay=True), "scale_from": 50, "dense_schedule": decay}
    staged = {"growth": BatchGrowthConfig(), "scale_from": 50, "dense_schedule": stages}
    for changes in ({"rule": None}, of_schedule, staged):
        assert follow_batch_size(replace(config, **changes))(400, "dense") == 1.0

"""Each group of parameters and tables gets its own rate: base, schedules of its group, and what others multiply."""

from __future__ import annotations

import pytest
import torch

from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.steering import Schedules, Steering
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
    tables = [TableConfig(name=str(n), num_rows=n, dim=1, optimizer=RowSGD(learning_rate=2.0)) for n in (10, 9, 11)]
    held = LocalTables(tables)
    given: list[list[float]] = []
    held.set_learning_rate_factors = lambda factors: given.append(list(factors))  # type: ignore[method-assign]
    steering = Steering(optimizer, [held], SCHEDULES, small_below_rows=10)
    for _ in range(2):  # a second time gives the same
        steering.set(50, lambda group: 3.0 if group == "head" else 1.0)
        found = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert found == pytest.approx({"dense": 0.05, "head": 0.2 * 0.5 * 0.75 * 3, "vectors": 0.2})
    assert given == [pytest.approx([0.05, 0.05 * 0.9, 0.05])] * 2
    assert steering.values() == pytest.approx({"dense_learning_rate": 0.05, "tables_learning_rate_factor": 0.05})

"""What a shard costs: its bytes against the tensors that are made, its ids and bags against drawn batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables
from embeddings.planning.machine import CPU, MACHINES
from embeddings.planning.table_cost import (
    GRADIENTS,
    LOOKUP,
    ROWS,
    UPDATE,
    Setting,
    cost_of,
    count_cells,
    shard_bytes,
)
from embeddings.shards import place
from embeddings.usage import TableUsage, Usage

MakeTable = Callable[..., TableConfig]


@pytest.mark.parametrize("row_type", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "optimizer",
    [
        RowSGD(learning_rate=0.1),
        RowWiseAdagrad(learning_rate=0.1),
        RowAdagrad(learning_rate=0.1),
        RowAdam(learning_rate=0.1),
        RowLamb(learning_rate=0.1),
        RowLamb(learning_rate=0.1, partial=True),
        RowCowClip(learning_rate=0.1),
        RowCowClip(learning_rate=0.1, l2_mode="lazy"),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_tensors(make_table: MakeTable, optimizer: RowOptimizer, row_type: str) -> None:
    config = make_table(num_rows=50, dim=12, optimizer=optimizer, row_type=row_type)
    (rows,) = build_tables([config]).rows()
    tensors = [rows.weight, *rows.state.values()]
    assert shard_bytes(config, 50, 12) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_rows_in_the_host_come_over_the_bus(make_table: MakeTable) -> None:
    machine = replace(MACHINES["h100"], seconds_per_shard=0.0)
    setting = Setting(machine=machine, usage=Usage(global_batch_size=1 << 20), ranks=2)
    config = make_table(num_rows=10_000_000, dim=128)
    near, far = (
        cost_of(table, place(table, "table_wise", [0]), setting).holding[0]
        for table in (config, replace(config, memory="uvm"))
    )
    # Half of 64 GB/s instead of half of 3.35 TB/s; each distinct row is read and written, with its state.
    more = (1 << 20) * 512 * (1 / 32e9 - 1 / 1.675e12)
    assert far[LOOKUP] - near[LOOKUP] == pytest.approx(more)
    distinct = setting.usage.of(config).distinct_rows(1 << 20, config.num_rows)
    assert far[UPDATE] - near[UPDATE] == pytest.approx(more * 2 * distinct / (1 << 20) * 516 / 512)
    assert far[ROWS] == near[ROWS]


def test_ids_and_bags_of_a_shard_are_those_of_drawn_batches(make_table: MakeTable) -> None:
    config, random = make_table(num_rows=1000, dim=8), np.random.default_rng(0)
    bags = [np.minimum(random.geometric(0.01, 5) - 1, 999) for _ in range(4000)]
    ids = np.concatenate(bags)
    traffic = tuple(np.concatenate([[0], np.cumsum(np.bincount(ids, minlength=1000))]) / len(ids))
    usage = Usage(tables={"t": TableUsage(ids_per_sample=5, bags_per_sample=1, traffic=traffic)})
    setting = Setting(machine=CPU, usage=usage, ranks=4)
    plan = place(config, "row_wise", range(4))
    expected_ids, expected_cells = count_cells(config, plan, setting)
    owners = [np.unique(bag // 250, return_counts=True) for bag in bags]
    found_cells = np.bincount(np.concatenate([who for who, _ in owners]), minlength=4) / len(bags)
    assert expected_ids == pytest.approx(np.bincount(ids // 250, minlength=4) / len(bags))
    assert expected_cells == pytest.approx(found_cells, abs=0.01)
    padded = replace(setting, machine=replace(CPU, padded=True))
    assert count_cells(config, plan, padded)[1].tolist() == [1, 1, 1, 1]


def test_more_of_anything_never_costs_less(make_table: MakeTable) -> None:
    setting = Setting(machine=CPU, usage=Usage(), ranks=4, ranks_per_node=2)

    def seconds(*, num_rows: int = 100_000, dim: int = 16, ids: float = 3, batch: int = 4096, kind: str) -> np.ndarray:
        config = make_table(num_rows=num_rows, dim=dim)
        tables = {"t": TableUsage(ids_per_sample=ids, bags_per_sample=1)}
        usage = Usage(global_batch_size=batch, tables=tables)
        cost = cost_of(config, place(config, kind, range(4), ranks_per_node=2), replace(setting, usage=usage))
        return np.concatenate([cost.holding.sum(axis=0), cost.asking, cost.everywhere])

    for kind in ("table_wise", "row_wise", "column_wise", "grid", "replicated"):
        less = seconds(kind=kind)
        for change in ({"dim": 32}, {"ids": 6}, {"batch": 8192}, {"num_rows": 200_000}):
            more = seconds(kind=kind, **change)
            assert (more >= less * (1 - 1e-12)).all(), (kind, change)
            assert more.sum() > less.sum() or change == {"num_rows": 200_000}, (kind, change)


def test_lookup_and_update_are_the_formulas(make_table: MakeTable) -> None:
    config = make_table(num_rows=10**9, dim=16)  # so many rows that none comes twice
    setting = Setting(machine=CPU, usage=Usage(global_batch_size=1000), ranks=2, ranks_per_node=2)
    cost = cost_of(config, place(config, "table_wise", [1]), setting)
    lookup = 1000 * (CPU.lookup.seconds_per_id + 16 * 4 / CPU.lookup.bytes_per_second)
    moved = 1000 * 16 * 4 + 2 * 1000 * (16 * 4 + 4)
    update = 1000 * CPU.update.seconds_per_id + moved / CPU.update.bytes_per_second
    assert cost.holding[0, LOOKUP] == pytest.approx(CPU.seconds_per_shard / 2 + lookup)
    assert cost.holding[0, UPDATE] == pytest.approx(CPU.seconds_per_shard / 2 + update, rel=1e-4)
    assert cost.holders.tolist() == [1]


@pytest.mark.parametrize("kind", ["row_wise", "replicated"])
def test_an_update_of_all_rows_costs_all_rows(make_table: MakeTable, kind: Any) -> None:
    machine = replace(CPU, seconds_per_shard=0.0)
    setting = Setting(machine=machine, usage=Usage(global_batch_size=1), ranks=2, ranks_per_node=2)
    seconds = []
    for trust in ("row", "table"):
        config = make_table(num_rows=1000, dim=16, optimizer=RowLamb(learning_rate=0.1, trust=trust))
        cost = cost_of(config, place(config, kind, range(2)), setting)
        seconds.append(cost.holding[:, UPDATE].sum() + cost.everywhere[UPDATE])
    # all of them rather than the one of the batch
    more = 2 * 999 * 3 * 16 * 4 / machine.update.bytes_per_second * machine.slowdown(2)
    assert seconds[1] - seconds[0] == pytest.approx(more, rel=1e-6)


def test_vectors_are_sent_unless_memory_is_shared(make_table: MakeTable) -> None:
    config = make_table(dim=16)
    on_one_node = Setting(machine=CPU, usage=Usage(global_batch_size=1000), ranks=2, ranks_per_node=2)
    plan = place(config, "table_wise", [0])
    half = 1000 * 16 * 4 / 2 / CPU.near.bytes_per_second  # to one of two ranks
    for setting, expected in (
        (on_one_node, 0.0),
        (replace(on_one_node, exchange_bytes=2), half / 2),
        (replace(on_one_node, machine=replace(CPU, shares_memory=False)), half),
        (replace(on_one_node, ranks_per_node=1), half * CPU.near.bytes_per_second / CPU.far.bytes_per_second),
    ):
        cost = cost_of(config, plan, setting)
        assert cost.holding[0, [ROWS, GRADIENTS]] == pytest.approx([expected, expected])


def test_copies_are_summed_and_not_sent(make_table: MakeTable) -> None:
    config = make_table(num_rows=100, dim=16)
    setting = Setting(machine=CPU, usage=Usage(global_batch_size=1000), ranks=2, ranks_per_node=2)
    cost = cost_of(config, place(config, "replicated", range(2)), setting)
    assert cost.holding.sum() == cost.asking.sum() == cost.everywhere[ROWS] == 0
    # A ring of two without latencies: two messages of half of the gradients and counts.
    assert cost.everywhere[GRADIENTS] == pytest.approx(100 * 17 * 4 / CPU.near.bytes_per_second)
    assert cost.bytes.tolist() == [100 * 17 * 4] * 2

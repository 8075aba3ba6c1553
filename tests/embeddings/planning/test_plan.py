"""Whatever is planned tiles its tables, fits into memory, keeps what was asked for, and is the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import RowAdagrad, RowAdam, RowLamb, RowSGD, RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.fbgemm.torchrec_plan import fit_plan
from embeddings.planning.machine import CPU, MACHINES
from embeddings.planning.plan import DoesNotFitError, plan_tables
from embeddings.planning.search import Board
from embeddings.planning.table_cost import Setting, cost_of, shard_bytes
from embeddings.shards import SHARDINGS, place
from embeddings.usage import TableUsage, Usage

OPTIMIZERS = (
    RowSGD(learning_rate=0.1),
    RowAdagrad(learning_rate=0.1),
    RowWiseAdagrad(learning_rate=0.1),
    RowAdam(learning_rate=0.1),
    RowLamb(learning_rate=0.1),
)
MakeTable = Callable[..., TableConfig]


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    """Draw everything that a plan depends on, but for memory."""
    per_node = draw(st.integers(1, 4))
    ranks = per_node * draw(st.integers(1, 4))
    configs = [
        TableConfig(
            name=f"t{i}",
            num_rows=draw(st.sampled_from([1, 2, 7, 100, 2_047, 2_048, 50_000, 3_000_000])),
            dim=draw(st.sampled_from([1, 4, 12, 16, 64])),
            features=tuple(f"f{i}.{j}" for j in range(draw(st.integers(1, 2)))),
            optimizer=draw(st.sampled_from(OPTIMIZERS)),
            row_type=draw(st.sampled_from(["fp32", "bf16"])),
        )
        for i in range(draw(st.integers(1, 7)))
    ]
    known = draw(st.lists(st.sampled_from(configs), unique_by=lambda config: config.name))
    usage = Usage(
        global_batch_size=draw(st.sampled_from([1, 64, 4096])),
        tables={
            config.name: TableUsage(
                ids_per_sample=draw(st.sampled_from([0.0, 0.5, 1.0, 20.0])),
                bags_per_sample=draw(st.sampled_from([0.5, 1.0])),
                traffic=draw(st.sampled_from([(), (0.0, 0.9, 0.95, 1.0)])),
            )
            for config in known
        },
    )
    fixed = draw(st.dictionaries(st.sampled_from([c.name for c in configs]), st.sampled_from(SHARDINGS), max_size=3))
    machine = draw(st.sampled_from([CPU, MACHINES["h100"]]))
    return {
        "configs": configs,
        "ranks": ranks,
        "ranks_per_node": per_node,
        "statistics": usage,
        # What torchrec cannot hold has a test of its own.
        "machine": replace(machine, memory_bytes=None, host_memory_bytes=None, padded=False),
        "fixed": fixed,
    }


def plan_of(task: dict[str, Any], **changes: Any) -> ShardingPlan:
    task = {**task, **changes}
    return plan_tables(task.pop("configs"), **task)


def bytes_by_rank(configs: list[TableConfig], plan: ShardingPlan) -> np.ndarray:
    """Count what ranks hold from the shards alone."""
    held = np.zeros(plan.ranks, dtype=np.int64)
    for config, table in zip(configs, plan.tables, strict=True):
        for shard in table.shards:
            held[shard.rank] += shard_bytes(config, shard.num_rows, shard.num_columns)
    return held


def seconds_of(configs: list[TableConfig], plan: ShardingPlan, setting: Setting) -> float:
    board = Board(setting, None)
    for config, table in zip(configs, plan.tables, strict=True):
        board.add(cost_of(config, table, setting))
    return board.seconds()


@settings(max_examples=80, deadline=None)
@given(tasks())
def test_every_number_of_a_table_lies_on_exactly_one_rank_or_on_all(task: dict[str, Any]) -> None:
    configs, plan = task["configs"], plan_of(task)
    assert [table.table for table in plan.tables] == [config.name for config in configs]
    for config, table in zip(configs, plan.tables, strict=True):
        rows, columns = min(config.num_rows, 3_000), config.dim  # of larger tables, all edges are looked at below
        scale = config.num_rows / rows
        covered = np.zeros((rows, columns), dtype=int)
        for shard in table.shards:
            first, last = (round(edge / scale) for edge in (shard.first_row, shard.first_row + shard.num_rows))
            covered[first:last, shard.first_column : shard.first_column + shard.num_columns] += 1
        assert (covered == (plan.ranks if table.sharding == "replicated" else 1)).all()
        numbers = sum(shard.num_rows * shard.num_columns for shard in table.shards)
        assert numbers == config.num_rows * config.dim * (plan.ranks if table.sharding == "replicated" else 1)
        assert {shard.rank for shard in table.shards} <= set(range(plan.ranks))
        assert table.why


@settings(max_examples=25, deadline=None)
@given(tasks(), st.floats(0.3, 2.0))
def test_memory_holds_what_is_planned_or_the_error_says_why_not(task: dict[str, Any], share: float) -> None:
    configs = task["configs"]
    whole = sum(shard_bytes(config, config.num_rows, config.dim) for config in configs)
    memory = max(1, int(share * whole / task["ranks"]))
    error, plan = None, None
    try:
        plan = plan_of(task, memory_bytes=memory)
    except DoesNotFitError as caught:
        error = caught
    if plan is not None:
        assert bytes_by_rank(configs, plan).max() <= memory
    if error is not None:
        assert error.available_bytes == memory < error.needed_bytes
        assert "\n" not in str(error)


@settings(max_examples=40, deadline=None)
@given(tasks())
def test_kinds_that_were_asked_for_are_kept_and_small_tables_are_copied(task: dict[str, Any]) -> None:
    plan = plan_of(task)
    for config, table in zip(task["configs"], plan.tables, strict=True):
        if config.name in task["fixed"]:
            assert table.sharding == task["fixed"][config.name]
            assert table.why.startswith(f"{table.sharding} was asked for")
        elif task["ranks"] == 1:
            assert table.sharding == "table_wise"
        else:
            assert (table.sharding == "replicated") == (config.num_rows < 2048)


@settings(max_examples=40, deadline=None)
@given(tasks(), st.sampled_from(["auto", "replicated"]))
def test_what_is_planned_for_torchrec_is_what_it_holds(task: dict[str, Any], kind: Any) -> None:
    configs = [replace(config, dim=-(-config.dim // 4) * 4) for config in task["configs"]]
    machine = replace(task["machine"], padded=True)
    plan = plan_of(task, configs=configs, machine=machine, sharding=kind, fixed={})
    plan.check(configs)
    held, notes = fit_plan(plan, configs)
    assert [(t.sharding, sorted(s.rank for s in t.shards)) for t in held.tables] == [
        (t.sharding, sorted(s.rank for s in t.shards)) for t in plan.tables
    ]
    assert not [note for note in notes if "replicated" in note]
    asked = [table.why.startswith("replicated was asked for, which torchrec has not: whole") for table in plan.tables]
    assert all(asked) if kind == "replicated" else not any(asked)


@pytest.mark.parametrize(
    ("changes", "kind"), [({"num_rows": 9}, "row_wise"), ({"dim": 4}, "column_wise"), ({"num_rows": 1}, "grid")]
)
def test_what_torchrec_cannot_cut_is_refused(make_table: MakeTable, changes: dict[str, int], kind: Any) -> None:
    machine = replace(CPU, padded=True)
    words = rf"table 't': expected a kind that cuts .* as torchrec does, .* got {kind}; place it table_wise"
    with pytest.raises(ValueError, match=words):
        plan_tables([make_table(**changes)], ranks=8, ranks_per_node=4, machine=machine, sharding=kind)
    plan_tables([make_table(**changes)], ranks=8, ranks_per_node=4, machine=CPU, sharding=kind)


@settings(max_examples=40, deadline=None)
@given(tasks())
def test_a_plan_is_no_slower_than_whole_tables_and_the_same_twice(task: dict[str, Any]) -> None:
    task["fixed"] = {}
    plan = plan_of(task)
    assert plan_of(task) == plan
    copied = {config.name: "replicated" for config in task["configs"] if config.num_rows < 2048}
    simple = plan_of(task, sharding="table_wise", fixed=copied if task["ranks"] > 1 else {})
    setting = Setting(
        machine=task["machine"],
        usage=task["statistics"],
        ranks=task["ranks"],
        ranks_per_node=task["ranks_per_node"],
    )
    # What is as good as equal is decided by the number of pieces.
    assert seconds_of(task["configs"], plan, setting) <= 1.011 * seconds_of(task["configs"], simple, setting)


def test_it_is_no_slower_than_tables_dealt_out_in_turn(make_table: MakeTable) -> None:
    random = np.random.default_rng(3)
    configs = [make_table(f"t{i}", num_rows=int(10 ** random.uniform(4, 7))) for i in range(20)]
    usage = Usage(
        global_batch_size=8192,
        tables={c.name: TableUsage(ids_per_sample=float(random.integers(1, 30)), bags_per_sample=1) for c in configs},
    )
    setting = Setting(machine=CPU, usage=usage, ranks=8, ranks_per_node=8)
    dealt = ShardingPlan(
        ranks=8,
        ranks_per_node=8,
        tables=tuple(place(config, "table_wise", [i % 8]) for i, config in enumerate(configs)),
    )
    planned = plan_tables(configs, ranks=8, ranks_per_node=8, statistics=usage)
    assert seconds_of(configs, planned, setting) < 0.8 * seconds_of(configs, dealt, setting)


def test_other_processes_plan_the_same() -> None:
    program = """
from embeddings import RowWiseAdagrad, TableConfig
from embeddings.planning.plan import plan_tables
adagrad = RowWiseAdagrad(learning_rate=0.1)
tables = [TableConfig(name=f"t{i}", num_rows=10 ** (2 + i % 5), dim=32, optimizer=adagrad) for i in range(12)]
print(plan_tables(tables, ranks=6, ranks_per_node=3, memory_bytes=100_000_000))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].startswith("ShardingPlan(")


@pytest.mark.parametrize(("num_rows", "copied"), [(2_047, True), (2_048, False)])
def test_tables_under_the_threshold_are_copied(make_table: MakeTable, num_rows: int, copied: bool) -> None:
    (table,) = plan_tables([make_table(num_rows=num_rows)], ranks=2, ranks_per_node=2).tables
    assert (table.sharding == "replicated") == copied
    (table,) = plan_tables([make_table(num_rows=num_rows)], ranks=2, replicate_below_rows=10_000).tables
    assert table.sharding == "replicated"
    (table,) = plan_tables([make_table(num_rows=num_rows)], ranks=2, replicate_below_rows=0).tables
    assert table.sharding != "replicated"


def test_more_ranks_than_tables_or_rows_or_columns(make_table: MakeTable) -> None:
    configs = [make_table("one", num_rows=3, dim=2), make_table("large", num_rows=5_000_000, dim=8)]
    plan = plan_tables(configs, ranks=64, ranks_per_node=8, replicate_below_rows=0, memory_bytes=10_000_000)
    plan.check(configs)
    assert bytes_by_rank(configs, plan).max() <= 10_000_000
    for kind in ("row_wise", "column_wise", "grid", "table_row_wise"):
        fixed = plan_tables(configs[:1], ranks=64, ranks_per_node=8, sharding=kind)
        fixed.check(configs[:1])
        assert len(fixed.tables[0].shards) <= 6


def test_a_table_too_large_for_a_rank_is_cut_and_says_so(make_table: MakeTable) -> None:
    large = make_table("large", num_rows=1_000_000, dim=16)
    (table,) = plan_tables([large], ranks=4, ranks_per_node=4, memory_bytes=30_000_000).tables
    assert len(table.shards) == 4
    assert table.why.startswith("does not fit into the 30 MB of one rank: ")


def test_a_table_that_is_asked_for_most_is_spread(make_table: MakeTable) -> None:
    configs = [make_table(f"t{i}") for i in range(8)]
    tables = {"t0": TableUsage(ids_per_sample=100, bags_per_sample=1)}
    plan = plan_tables(configs, ranks=8, ranks_per_node=8, statistics=Usage(tables=tables))
    assert len(plan.tables[0].shards) == 8
    assert "would make a step" in plan.tables[0].why
    assert all(table.sharding == "table_wise" for table in plan.tables[1:])
    assert len({table.shards[0].rank for table in plan.tables[1:]}) >= 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 3, "ranks_per_node": 2}, "expected a multiple of ranks_per_node, got 3 and 2"),
        ({"ranks": 0}, "expected a multiple of ranks_per_node, got 0 and 1"),
        ({"memory_bytes": 0}, "memory: expected at least 1 byte per rank, got 0"),
        ({"sharding": "rows"}, "sharding: expected auto, table_wise, .* got 'rows'"),
        ({"fixed": {"site": "row_wise"}}, "sharding: expected one of the tables sites and 1 more, got 'site'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(make_table: MakeTable, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_tables([make_table("sites"), make_table("other")], **{"ranks": 2, **changes})

"""What is said to make tables fit does so when it is done, and the reason names what it is due to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import RowAdam, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.planning.machine import CPU, MACHINES
from embeddings.planning.plan import DoesNotFitError, plan_tables
from embeddings.planning.task import count_of, format_bytes, name_choices

MakeTable = Callable[..., TableConfig]
CLASSES = {"RowSGD": RowSGD, "RowWiseAdagrad": RowWiseAdagrad}


def misfit(configs: list[TableConfig], **arguments: Any) -> DoesNotFitError:
    with pytest.raises(DoesNotFitError) as caught:
        plan_tables(configs, **arguments)
    return caught.value


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 1.05), st.sampled_from([1, 2, 8]), st.sampled_from(["auto", "column_wise"]))
def test_each_remedy_alone_makes_tables_fit(seed: int, share: float, ranks: int, sharding: Any) -> None:
    random = np.random.default_rng(seed)
    configs = [
        TableConfig(
            name=f"t{i}", num_rows=int(10 ** random.uniform(1, 6)), dim=32, optimizer=RowAdam(learning_rate=0.1)
        )
        for i in range(6)
    ]
    total = sum(config.num_rows * 32 * 12 for config in configs)
    task = {"ranks": ranks, "ranks_per_node": ranks, "memory_bytes": int(share * total / ranks), "sharding": sharding}
    try:
        plan_tables(configs, **task)
    except DoesNotFitError as error:
        remedies = error.remedies
    else:
        return
    assert remedies.memory_bytes is not None
    for changes in (
        {"memory_bytes": remedies.memory_bytes},
        {"ranks": remedies.ranks} if remedies.ranks else {},
        {"sharding": "auto"} if remedies.auto else {},
        {} if remedies.replicate_below_rows is None else {"replicate_below_rows": remedies.replicate_below_rows},
    ):
        if changes:
            plan_tables(configs, **{**task, **changes}).check(configs)
    if remedies.row_type:
        plan_tables([replace(config, row_type=remedies.row_type) for config in configs], **task)
    if remedies.optimizer:
        optimizer = CLASSES[remedies.optimizer](learning_rate=0.1)
        plan_tables([replace(config, optimizer=optimizer) for config in configs], **task)
    if remedies.dim:
        plan_tables([replace(config, dim=remedies.dim) for config in configs], **task)
        with pytest.raises(DoesNotFitError):
            plan_tables([replace(config, dim=remedies.dim + 4) for config in configs], **task)


def test_ranks_are_no_more_than_needed(make_table: MakeTable) -> None:
    configs = [make_table(f"t{i}", num_rows=1_000_000, dim=24) for i in range(10)]
    error = misfit(configs, ranks=2, ranks_per_node=2, memory_bytes=100_000_000)
    assert error.remedies.ranks == 10  # 1 GB in all
    assert "10 ranks" in str(error)


def test_a_table_that_is_too_large_alone_is_named(make_table: MakeTable) -> None:
    configs = [make_table("small"), make_table("huge", num_rows=10_000_000, dim=60)]
    error = misfit(configs, ranks=2, memory_bytes=100_000_000)
    assert error.tables == ("huge",)
    assert "because table 'huge' (2.44 GB) takes 1.22 GB of a rank, however it is cut; would fit with: " in str(error)
    fixed = misfit(configs, ranks=64, memory_bytes=1_000_000_000, fixed={"huge": "table_wise"})
    assert "takes 2.44 GB of a rank as table_wise" in str(fixed)
    assert fixed.remedies.auto == ("huge",)
    assert fixed.remedies.ranks is None


def test_tables_that_are_too_many_are_summed_up(make_table: MakeTable) -> None:
    error = misfit([make_table(f"t{i}", num_rows=10_000 * (i + 1)) for i in range(9)], ranks=1, memory_bytes=10_000_000)
    assert error.tables == ("t8", "t7", "t6")
    assert "9 tables of 30.6 MB in all on 1 rank, above all 't8' (6.12 MB), 't7' (5.44 MB)" in str(error)


def test_copies_that_fill_every_rank_are_named_and_may_be_cut(make_table: MakeTable) -> None:
    configs = [make_table(f"t{i}", num_rows=2_000, dim=15) for i in range(20)]  # 128 kB each
    error = misfit(configs, ranks=64, ranks_per_node=8, memory_bytes=1_000_000)
    assert "the copies of 20 tables take 2.56 MB of every rank" in str(error)
    assert error.remedies.ranks is None
    assert error.remedies.replicate_below_rows == 0


@pytest.mark.parametrize("memory", ["uvm", "uvm_caching"])
def test_tables_of_a_gpu_may_lie_in_its_host(make_table: MakeTable, memory: str) -> None:
    gpu = {"ranks": 2, "ranks_per_node": 2, "machine": MACHINES["h100"]}
    configs = [make_table(f"t{i}", num_rows=40_000_000, dim=128) for i in range(8)]  # 165 GB; 64 and 125 GB of a rank
    error = misfit(configs, **gpu)
    assert error.remedies.memory == "uvm"
    assert "memory uvm, the host's" in str(error)
    hosted = [replace(config, memory=memory) for config in configs]
    plan_tables(hosted, **gpu).check(hosted)
    assert misfit([replace(config, num_rows=80_000_000) for config in hosted], **gpu).available_bytes == 125 * 10**9
    # A limit that was given holds wherever tables lie.
    assert misfit(configs, **gpu, memory_bytes=64 * 10**9).remedies.memory is None
    assert misfit(configs, ranks=2, memory_bytes=64 * 10**9).remedies.memory is None


def test_a_cache_takes_a_fifth_of_the_rows_of_a_gpu() -> None:
    small = replace(MACHINES["h100"], memory_bytes=10**9)
    assert [small.memory_for(memory) for memory in ("device", "uvm", "uvm_caching")] == [10**9, 125 * 10**9, 5 * 10**9]
    assert CPU.memory_for("uvm_caching") is None


def test_nothing_helps(make_table: MakeTable) -> None:
    error = misfit([make_table("t", dim=1)], ranks=1, memory_bytes=1, sharding="replicated")
    assert error.remedies.ranks is None
    assert error.remedies.row_type is None
    assert error.remedies.words() == ["800 kB of memory per rank"]


def test_bytes_are_written_with_three_digits_and_never_too_few() -> None:
    written = [format_bytes(count) for count in (0, 999, 1000, 12_345, 999_600, 1_234_567_890, 5e12, 5.678e15)]
    assert written == ["0 bytes", "999 bytes", "1 kB", "12.3 kB", "1 MB", "1.23 GB", "5 TB", "5678 TB"]
    random = np.random.default_rng(0)
    for count in (10 ** random.uniform(0, 14.9, 500)).astype(int).tolist():
        number, unit = format_bytes(count, up=True).split()
        assert 1 <= float(number) < 1000 or unit == "bytes"
        size = float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
        assert count * (1 - 1e-12) <= size <= count * 1.0101


def test_names_that_were_meant_come_first() -> None:
    names = [f"table_{i}" for i in range(30)] + ["publisher"]
    assert name_choices("publsher", names) == "publisher and 30 more"
    assert name_choices("x", names[:2]) == "table_0, table_1"
    assert name_choices("zzz", names).endswith("table_7 and 23 more")
    assert [count_of(n, "rank") for n in (0, 1, 2000)] == ["0 ranks", "1 rank", "2,000 ranks"]

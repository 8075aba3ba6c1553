"""torchrec's sharded tables on several ranks train the rows of one process, whichever way they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import IdOutOfRangeError, RowAdagrad, RowOptimizer, RowSGD, RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.fbgemm.fbgemm_tables import FbgemmTables
from embeddings.fbgemm.torchrec_plan import fit_plan
from embeddings.interface import Tables
from embeddings.shards import Sharding, place

STEPS = 6
BATCHES = [7, 4, 1, 5, 2, 9]  # one rank has no sample of the third
OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": RowSGD(learning_rate=0.3),
    "adagrad": RowAdagrad(learning_rate=0.1),
    "rowwise": RowWiseAdagrad(learning_rate=0.1),
}
# by name, so that what ranks are given can be pickled: optimizer, sharding, exchange, weighted
RUNS: dict[str, tuple[str, Sharding | str, str, bool]] = {
    "table_wise": ("rowwise", "table_wise", "fp32", False),
    "row_wise": ("rowwise", "row_wise", "fp32", False),
    "column_wise": ("sgd", "column_wise", "fp32", False),
    "column_wise adagrad": ("adagrad", "column_wise", "fp32", False),
    "table_row_wise": ("rowwise", "table_row_wise", "fp32", False),
    "mixed": ("adagrad", "mixed", "fp32", False),
    "weighted": ("rowwise", "row_wise", "fp32", True),
    "replicated": ("sgd", "replicated", "fp32", False),
    "half": ("sgd", "row_wise", "fp16", False),
}
MIXED: tuple[Sharding, ...] = ("row_wise", "column_wise", "table_wise")


def configs_of(optimizer: str) -> list[TableConfig]:
    rule = OPTIMIZERS[optimizer]
    return [
        TableConfig(name="a", num_rows=11, dim=8, features=("x", "y"), optimizer=rule),
        TableConfig(name="b", num_rows=5, dim=16, pooling="mean", optimizer=rule),
        TableConfig(name="c", num_rows=301, dim=8, optimizer=rule, init_scale=0.5, group="other"),
    ]


def plan_of(configs: list[TableConfig], sharding: str, count: int) -> ShardingPlan:
    kinds: list[Any] = list(MIXED) if sharding == "mixed" else [sharding] * len(configs)
    ranks = list(range(count))
    tables = [
        place(config, kind, ranks[number % count :] if kind == "table_wise" else ranks, ranks_per_node=count)
        for number, (config, kind) in enumerate(zip(configs, kinds, strict=True))
    ]
    return ShardingPlan(ranks=count, ranks_per_node=count, tables=tuple(tables))


def share(batch: int, rank: int, count: int) -> tuple[int, int]:
    return batch * rank // count, batch * (rank + 1) // count


def draw(configs: list[TableConfig], batch: int, first: int, last: int, seed: int, weighted: bool) -> KeyedJaggedTensor:
    """Samples [first, last) of a batch that is the same wherever it is drawn; features in another order, one unused."""
    random = np.random.default_rng(seed)
    limits = {"unused": 99} | {feature: config.num_rows for config in reversed(configs) for feature in config.features}
    ids, lengths, weights = [], [], []
    for limit in limits.values():
        bags = [random.integers(0, limit, random.integers(0, 5)) for _ in range(batch)]
        scales = [random.random(len(bag)) for bag in bags]
        ids += bags[first:last]
        weights += scales[first:last]
        lengths += [len(bag) for bag in bags[first:last]]
    empty = [np.empty(0, np.int64)]
    return KeyedJaggedTensor(
        keys=list(limits),
        values=torch.from_numpy(np.concatenate(ids + empty).astype(np.int64)),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        weights=torch.from_numpy(np.concatenate([*weights, np.empty(0)])).float() if weighted else None,
    )


def train(
    tables: Tables, configs: list[TableConfig], rank: int, count: int, weighted: bool, device: str = "cpu"
) -> list[torch.Tensor]:
    """Trains on this rank's samples towards random targets, looking one batch ahead; gives what came out."""
    batches = []
    for step, batch in enumerate(BATCHES):
        batches.append(draw(configs, batch, *share(batch, rank, count), step, weighted).to(torch.device(device)))
    width, outputs = sum(tables.feature_dims), []
    for step, batch in enumerate(BATCHES):
        first, last = share(batch, rank, count)
        tables.set_learning_rate_factors([1 / (1 + step), 1 / (1 + step), 2 / (1 + step)])
        tables.set_eps_factor(1e6 if step % 2 else 1.0)
        pooled = tables(batches[step]).values()
        if step + 1 < STEPS:
            tables.prefetch(batches[step + 1])
        target = torch.from_numpy(np.random.default_rng(100 + step).normal(size=(batch, width))).float()[first:last]
        ((pooled - target.to(device)).square().sum() / batch).backward()
        outputs.append(pooled.detach().cpu())
    return outputs


def describe(tables: Tables) -> list[tuple[Any, ...]]:
    return [
        (
            r.config.name,
            r.first_row,
            r.first_column,
            r.weight.cpu().clone(),
            {k: v.cpu().clone() for k, v in r.state.items()},
        )
        for r in tables.rows()
    ]


def train_ranks(rank: int, count: int, device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """All runs in one process per rank: starting it takes longer than they do."""
    from embeddings.fbgemm.torchrec_tables import TorchrecTables

    results = {}
    for name, (optimizer, sharding, exchange, weighted) in RUNS.items():
        configs = configs_of(optimizer)
        plan = plan_of(configs, sharding, count)
        tables = TorchrecTables(configs, plan=plan, device=device, seed=3, exchange=exchange)
        start = describe(tables)
        outputs = train(tables, configs, rank, count, weighted, device)
        results[name] = (start, outputs, describe(tables), tables.notes)
    tables.eval()
    before = describe(tables)
    tables(draw(configs, 4, *share(4, rank, count), 0, False).to(torch.device(device)))
    results["evaluated"] = (before, [], describe(tables), [])
    wrong = KeyedJaggedTensor(
        ["x", "y", "b", "c"], torch.tensor([1, 2, 3, 4 + 297 * (rank == 0)]), lengths=torch.ones(4).long()
    )
    tables(wrong.to(torch.device(device)))
    try:
        tables.check_ids()
        results["wrong id"] = ("",)
    except IdOutOfRangeError as error:
        results["wrong id"] = (str(error),)
    return results


def train_on_gpus(rank: int, count: int) -> dict[str, tuple[Any, ...]]:
    torch.cuda.set_device(rank)
    return train_ranks(rank, count, "cuda")


train_on_gpus.backend = "cpu:gloo,cuda:nccl"  # type: ignore[attr-defined]


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", 2),
        pytest.param(("cuda", 1), marks=pytest.mark.gpu),
        pytest.param(("cuda", 2), marks=pytest.mark.gpu),
    ],
    ids=["2 on the CPU", "1 GPU", "2 GPUs"],
)
def on_ranks(request: pytest.FixtureRequest, run_ranks: Any) -> Iterator[list[dict[str, tuple[Any, ...]]]]:
    """What each rank saw of all runs."""
    device, count = request.param
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, found {torch.cuda.device_count()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(count))
        yield run_ranks(train_ranks if device == "cpu" else train_on_gpus, count)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_the_rows_of_one_process(name, on_ranks):
    optimizer, _, exchange, weighted = RUNS[name]
    close = {"rtol": 2e-2, "atol": 2e-3} if exchange == "fp16" else {"rtol": 1e-5, "atol": 2e-6}
    configs = configs_of(optimizer)
    whole = FbgemmTables(configs, seed=3)
    begun = {r.config.name: r.weight.clone() for r in whole.rows()}
    outputs = train(whole, configs, 0, 1, weighted)
    for step, pooled in enumerate(outputs):
        parts = torch.cat([results[name][1][step] for results in on_ranks])
        torch.testing.assert_close(parts, pooled, **close)
    wanted = {r.config.name: r for r in whole.rows()}
    held = dict.fromkeys(wanted, 0)
    for results in on_ranks:
        starts, _, ends, _ = results[name]
        for (table, row, column, start, _), (_, _, _, end, state) in zip(starts, ends, strict=True):
            rectangle = slice(row, row + len(end)), slice(column, column + end.shape[1])
            held[table] += end.numel()
            assert torch.equal(start, begun[table][rectangle]), table
            torch.testing.assert_close(end, wanted[table].weight[rectangle], **close)
            assert set(state) == set(wanted[table].state)
            if exchange == "fp32" and state:
                sums = wanted[table].state["sum_of_squares"]
                expected = sums[rectangle] if sums.ndim == 2 else sums[rectangle[0]]
                torch.testing.assert_close(state["sum_of_squares"], expected, **close)
    assert held == {name: rows.weight.numel() for name, rows in wanted.items()}


def test_evaluation_changes_nothing_and_a_table_not_replicated_is_told(on_ranks):
    for results in on_ranks:
        before, _, after, _ = results["evaluated"]
        for (*_, rows, _), (*_, same, _) in zip(before, after, strict=True):
            assert torch.equal(rows, same)
        assert results["table_wise"][3] == []
        # the largest goes where the least lies so far
        places = [0, 1, 1] if len(on_ranks) == 2 else [0, 0, 0]
        assert [note.split(" instead")[0] for note in results["replicated"][3]] == [
            f"table {table!r}: on rank {place}" for table, place in zip("abc", places, strict=True)
        ]


def test_a_wrong_id_is_named_by_its_rank_after_all_have_looked_up(on_ranks):
    told = [results["wrong id"][0] for results in on_ranks]
    assert told[0].startswith("feature 'c', row 0 of the batch: expected an id in [0, 301) for table 'c', got 301")
    assert told[1:] == [""] * (len(on_ranks) - 1)


def test_what_torchrec_cannot_hold_is_one_line():
    config = TableConfig(name="a", num_rows=10, dim=8)

    def plan(sharding: Sharding, ranks: list[int], **more: Any) -> ShardingPlan:
        return ShardingPlan(ranks=4, ranks_per_node=2, tables=(place(config, sharding, ranks, **more),))

    with pytest.raises(ValueError, match="table 'a': expected row_wise to cut 10 rows over all 4 ranks"):
        fit_plan(plan("row_wise", [0, 1]), [config])
    with pytest.raises(ValueError, match="table 'a': expected shards of a multiple of 4 columns for fbgemm, got 2"):
        fit_plan(plan("column_wise", [0, 1, 2, 3]), [config])
    with pytest.raises(ValueError, match="expected table_row_wise to cut 10 rows over one node's 2 ranks"):
        fit_plan(plan("table_row_wise", [1, 2]), [config])
    blocks, notes = fit_plan(plan("grid", [0, 1, 2, 3], ranks_per_node=2), [config])
    assert len(notes) == 1
    assert notes[0].startswith("table 'a': cut by columns, and fbgemm's RowWiseAdagrad measures each shard's columns")
    by_number = replace(config, optimizer=RowAdagrad(learning_rate=0.1))
    assert fit_plan(plan("grid", [0, 1, 2, 3], ranks_per_node=2), [by_number])[1] == []
    assert [(s.rank, s.first_row, s.num_rows, s.first_column) for s in blocks.tables[0].shards] == [
        (0, 0, 5, 0),
        (1, 5, 5, 0),
        (2, 0, 5, 4),
        (3, 5, 5, 4),
    ]

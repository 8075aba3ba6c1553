"""Unpooled tables: a vector for each id, and over ranks the rows of one process, for every cut and row optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from dlrm.distributed.ranks import ALONE, Ranks
from embeddings import IdOutOfRangeError, RowAdagrad, RowAdam, RowLamb, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_sequence_tables
from embeddings.interface import Tables
from embeddings.local.local_tables import LocalTables
from embeddings.sharded.sequence_tables import SequenceTables
from embeddings.shards import SHARDINGS, ShardingPlan, place
from embeddings.tables import OtherRanksIdError

OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=0.05, weight_decay=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, eps=1e-2),
    "rowwise": RowWiseAdagrad(learning_rate=0.1, eps=1e-3),
    "adam": RowAdam(learning_rate=0.02, eps=1e-2),
    "lamb": RowLamb(learning_rate=0.02, eps=1e-2),
    "partial lamb": RowLamb(learning_rate=0.02, eps=1e-2, partial=True),
    "touched lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="touched"),
    "partial touched lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="touched", partial=True),
}
BATCHES = [7, 4, 1, 5, 2, 9, 12, 1, 6, 8] * 2
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def describe() -> list[TableConfig]:
    """A table per cut and optimizer; some have two features, and a pooling, which means nothing here."""
    return [
        TableConfig(
            name=f"{kind}, {name}",
            num_rows=23,
            dim=5 + number % 3,
            features=(f"{kind}, {name} x", f"{kind}, {name} y") if number % 2 else (),
            pooling="mean" if number % 3 else "sum",
            optimizer=rule,
            init_scale=0.5,
        )
        for number, (kind, (name, rule)) in enumerate((k, o) for k in SHARDINGS for o in OPTIMIZERS.items())
    ]


def plan_of(count: int, *, nodes: bool) -> ShardingPlan:
    tables = []
    for config in describe():
        kind, ranks = config.name.split(",")[0], list(range(count))
        on = {"table_wise": ranks[-1:], "table_row_wise": ranks[-2:]}.get(kind, ranks)
        tables.append(place(config, kind, on, ranks_per_node=2))
    return ShardingPlan(ranks=count, ranks_per_node=1 if nodes else count, tables=tuple(tables))


def draw(step: int, ranks: Ranks) -> KeyedJaggedTensor:
    """This rank's share of a batch of sequences of 0 to 4 ids, with weights that must not matter."""
    random, first, count = np.random.default_rng(step), *ranks.share_of(BATCHES[step])
    names = [name for config in reversed(describe()) for name in config.features]
    whole = [[random.integers(0, 23, random.integers(0, 5)) for _ in range(BATCHES[step])] for _ in names]
    bags = [bag for its in whole for bag in its[first : first + count]]
    ids = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *bags]))
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64)
    return KeyedJaggedTensor(keys=names, values=ids, lengths=lengths, weights=ids.float())


def loss_of(vectors: Tensor, batch: int) -> Tensor:
    return (vectors.sin() + vectors.square()).sum() / batch


def train(tables: SequenceTables, ranks: Ranks) -> list[dict[str, NDArray[np.float32]]]:
    """Trains one batch ahead of itself; gives the vectors that came out, by step and feature."""
    found, batches = [], [draw(step, ranks) for step in range(len(BATCHES))]
    for step, size in enumerate(BATCHES):
        out: dict[str, JaggedTensor] = tables(batches[step])
        if step % 3 and step + 1 < len(BATCHES):
            tables.prefetch(batches[step + 1])
        sum(loss_of(jagged.values(), size) for jagged in out.values()).backward()
        for name, jagged in out.items():
            assert torch.equal(jagged.lengths(), batches[step][name].lengths())
        found.append({name: jagged.values().detach().numpy() for name, jagged in out.items()})
    return found


def train_pooled() -> LocalTables:
    """The same with pooled tables, to which each id is a bag; shorter features end with empty ones."""
    tables = LocalTables(describe(), seed=3)
    for step, size in enumerate(BATCHES):
        batch = draw(step, ALONE)
        ids = {name: batch[name].values() for name in batch.keys()}  # noqa: SIM118
        longest = max(map(len, ids.values()))
        lengths = [torch.arange(longest) < len(own) for own in ids.values()]
        padded = KeyedJaggedTensor(
            keys=list(ids), values=torch.cat(list(ids.values())), lengths=torch.cat(lengths).long()
        )
        out = tables(padded)
        vectors = [out[name][: len(own)] for name, own in ids.items()]
        sum(loss_of(own, size) for own in vectors).backward()
    return tables


def held_by(tables: Tables) -> list[Any]:
    return [
        (
            r.config.name,
            r.first_row,
            r.first_column,
            r.weight.numpy().copy(),
            {k: v.numpy() for k, v in r.state.items()},
        )
        for r in tables.rows()
    ]


def train_over_ranks(rank: int, count: int) -> dict[Any, Any]:
    ranks, results = Ranks(rank=rank, count=count), {}
    for nodes in (False, True):
        tables = build_sequence_tables(describe(), plan=plan_of(count, nodes=nodes), seed=3)
        results[nodes] = (train(tables, ranks), held_by(tables))
    wrong = draw(0, ranks)
    if rank == count - 1:
        wrong.values()[0] = 23
    try:
        tables(wrong)
    except (IdOutOfRangeError, OtherRanksIdError) as error:
        results["wrong"] = (type(error).__name__, str(error))
    results["same"] = all(
        np.array_equal(own, its) for (*_, own, _), (*_, its, _) in zip(held_by(tables), results[True][1], strict=True)
    )
    return results


@pytest.fixture(scope="module")
def alone() -> tuple[Any, dict[str, Any]]:
    tables = build_sequence_tables(describe(), seed=3)
    vectors = train(tables, ALONE)
    return vectors, {name: (weight, state) for name, _, _, weight, state in held_by(tables)}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def over_ranks(request: pytest.FixtureRequest, run_ranks: Any) -> list[dict[Any, Any]]:
    results: list[dict[Any, Any]] = run_ranks(train_over_ranks, request.param, seconds=240)
    return results


def test_one_process_trains_what_pooled_tables_train(alone):
    for name, _, _, weight, state in held_by(train_pooled()):
        np.testing.assert_allclose(alone[1][name][0], weight, **CLOSE, err_msg=name)
        for key, kept in state.items():
            np.testing.assert_allclose(alone[1][name][1][key], kept, **CLOSE, err_msg=f"{name} {key}")


@pytest.mark.parametrize("nodes", [False, True], ids=["memory", "network"])
def test_ranks_train_the_rows_of_one_process(over_ranks, alone, nodes):
    vectors, rows = alone
    count = len(over_ranks)
    for step in range(len(BATCHES)):
        for name, expected in vectors[step].items():
            found = np.concatenate([results[nodes][0][step][name] for results in over_ranks])
            np.testing.assert_allclose(found, expected, **CLOSE, err_msg=f"step {step}, {name}")
    numbers = dict.fromkeys(rows, 0)
    for results in over_ranks:
        for name, row, column, weight, state in results[nodes][1]:
            numbers[name] += weight.size
            where = slice(row, row + weight.shape[0]), slice(column, column + weight.shape[1])
            np.testing.assert_allclose(weight, rows[name][0][where], **CLOSE, err_msg=name)
            for key, kept in state.items():
                np.testing.assert_allclose(kept, rows[name][1][key][where[: kept.ndim]], **CLOSE, err_msg=name)
    for name, (weight, _) in rows.items():
        assert numbers[name] == weight.size * (count if "replicated" in name else 1), name


def test_a_wrong_id_is_one_line_on_all_ranks_and_changes_nothing(over_ranks):
    for rank, results in enumerate(over_ranks):
        kind, line = results["wrong"]
        assert kind == ("IdOutOfRangeError" if rank == len(over_ranks) - 1 else "OtherRanksIdError")
        assert "\n" not in line
        assert ("expected an id in [0, 23)" in line) == (rank == len(over_ranks) - 1)
        assert results["same"] is True

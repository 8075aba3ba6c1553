"""Sharded tables give what one process gives, whatever is called in whatever order, and whichever rank is late."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.distributed.ranks import ALONE, Ranks
from embeddings import RowAdagrad, RowAdam, RowLamb, RowSGD, RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.interface import Tables
from embeddings.local.local_tables import LocalTables
from embeddings.sharded.sharded_tables import ShardedTables
from embeddings.shards import SHARDINGS, place

COUNT = 3
PROGRAMS = 6
OPTIMIZERS = {
    "table_wise": RowSGD(learning_rate=0.05),
    "column_wise": RowLamb(learning_rate=0.02, eps=1e-2, partial=True),
    "row_wise": RowWiseAdagrad(learning_rate=0.1, eps=1e-3),
    "table_row_wise": RowLamb(learning_rate=0.02, eps=1e-2, trust="touched"),
    "grid": RowAdagrad(learning_rate=0.1, eps=1e-2),
    "replicated": RowAdam(learning_rate=0.02, eps=1e-2),
}


def describe() -> list[TableConfig]:
    """A table for each kind of sharding, of which two have two features and two are means."""
    return [
        TableConfig(
            name=kind,
            num_rows=61 + 10 * number,
            dim=4 + number,
            features=(f"{kind} x", f"{kind} y") if number % 2 else (),
            pooling="mean" if number % 3 == 1 else "sum",
            optimizer=OPTIMIZERS[kind],
            init_scale=0.5,
        )
        for number, kind in enumerate(SHARDINGS)
    ]


def plan_of(configs: list[TableConfig], *, nodes: bool) -> ShardingPlan:
    """`nodes`: as if each rank had a machine of its own, so that vectors go over the network."""
    on = {"table_wise": [1], "table_row_wise": [1, 2]}
    tables = [place(c, c.name, on.get(c.name, [*range(COUNT)]), ranks_per_node=2) for c in configs]
    return ShardingPlan(ranks=COUNT, ranks_per_node=1 if nodes else COUNT, tables=tuple(tables))


def draw(configs: list[TableConfig], size: int, random: np.random.Generator, ranks: Ranks) -> KeyedJaggedTensor:
    """This rank's share of a batch, bags of 0 to 3 ids, or of 1 to 3; one in two is weighted."""
    first, count = ranks.share_of(size)
    shortest = random.integers(0, 2)  # what a rank asks of itself is not copied where no bag is empty
    ids, lengths = [np.empty(0, np.int64)], []
    features = [(name, config.num_rows) for config in configs for name in config.features]
    for _, num_rows in features:
        whole = random.integers(shortest, 4, size)
        edges = np.concatenate([[0], whole.cumsum()])[[first, first + count]]
        ids.append(random.integers(0, num_rows, whole.sum())[slice(*edges)])
        lengths.append(whole[first : first + count])
    values = torch.from_numpy(np.concatenate(ids))
    return KeyedJaggedTensor(
        keys=[name for name, _ in features],
        values=values,
        lengths=torch.from_numpy(np.concatenate(lengths)),
        weights=(values % 7).float() / 3 if random.integers(0, 2) else None,
    )


def run_program(tables: Tables, ranks: Ranks, seed: int) -> tuple[list[NDArray[np.float32]], list[str]]:
    """Calls what trainers may call, in an order that the seed decides; returns what was pooled, and the calls."""
    random, configs = np.random.default_rng(seed), list(tables.table_configs)
    sizes = random.choice([1, 2, 40, 600], size=40).tolist()
    batches = [draw(configs, size, random, ranks) for size in sizes]
    waiting, ahead, pending, pooled, calls = list(range(len(sizes))), set[int](), [], [], []

    def gradient_of(out: torch.Tensor, number: int) -> torch.Tensor:
        return (out.sin() + out.square()).sum() / sizes[number]

    while waiting:
        call = str(random.choice(["train", "train", "evaluate", "prefetch", "backward", "backward", "two", "drop"]))
        if call in ("train", "evaluate"):
            number = waiting.pop(int(random.integers(0, min(4, len(waiting)))))
            tables.train(call == "train")
            out = tables(batches[number]).values()
            pooled.append(out.detach().numpy().copy())
            pending += [(out, number)] if call == "train" else []
        elif call == "prefetch":
            number = waiting[int(random.integers(0, min(4, len(waiting))))]
            if number not in ahead:
                ahead.add(number)
                tables.prefetch(batches[number])
        elif len(pending) >= (2 if call == "two" else 1):
            chosen = [pending.pop(int(random.integers(0, len(pending)))) for _ in range(1 + (call == "two"))]
            if call != "drop":
                sum(gradient_of(*one) for one in chosen).backward()
        calls.append(call)
    return pooled, calls


def slow_down(tables: ShardedTables, rank: int) -> None:
    """Lets this rank be late, now and then, in reading what it was given."""
    exchange, random = tables._rows._vectors, np.random.default_rng(rank)

    def late(send: Callable[..., int]) -> Callable[..., int]:
        def send_and_wait(*arguments: Any) -> int:
            sent = send(*arguments)
            time.sleep(float(random.choice([0, 0, 0.003])))
            return sent

        return send_and_wait

    exchange.send_vectors, exchange.send_gradients = late(exchange.send_vectors), late(exchange.send_gradients)


def held_by(tables: Tables) -> list[Any]:
    return [(r.config.name, r.first_row, r.first_column, r.weight.float().numpy().copy()) for r in tables.rows()]


def do_programs(rank: int, count: int) -> dict[Any, Any]:
    ranks, results = Ranks(rank=rank, count=count), {}
    for nodes in (False, True):
        for seed in range(PROGRAMS):
            torch.set_num_threads(1 + seed % 2)
            tables = ShardedTables(describe(), plan=plan_of(describe(), nodes=nodes), seed=seed)
            slow_down(tables, rank)
            results[nodes, seed] = (*run_program(tables, ranks, seed), held_by(tables))
    return results


@pytest.fixture(scope="module")
def over_ranks(run_ranks: Any) -> list[dict[Any, Any]]:
    results: list[dict[Any, Any]] = run_ranks(do_programs, COUNT, seconds=240)
    return results


@pytest.mark.parametrize("seed", range(PROGRAMS))
@pytest.mark.parametrize("nodes", [False, True], ids=["memory", "network"])
def test_any_order_of_calls_gives_what_one_process_gives(over_ranks, nodes, seed):
    whole = LocalTables(describe(), seed=seed)
    pooled, calls = run_program(whole, ALONE, seed)
    assert {"train", "evaluate", "prefetch", "backward", "two", "drop"} <= set(calls)
    for number, expected in enumerate(pooled):
        found = np.concatenate([results[nodes, seed][0][number] for results in over_ranks])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=f"look-up {number}")
    rows = {name: weight for name, _, _, weight in held_by(whole)}
    for results in over_ranks:
        assert results[nodes, seed][1] == calls
        for name, row, column, weight in results[nodes, seed][2]:
            where = slice(row, row + weight.shape[0]), slice(column, column + weight.shape[1])
            np.testing.assert_allclose(weight, rows[name][where], rtol=1e-5, atol=1e-5, err_msg=name)

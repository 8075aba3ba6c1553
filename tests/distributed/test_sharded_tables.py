"""Tables over two and three ranks train the rows of one process: however they are cut, whatever updates their rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.distributed.parallelize import DenseReducer
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.model import DLRM
from dlrm.optim.lamb import Lamb
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, ShardingPlan, TableConfig
from embeddings.interface import TableRows, Tables
from embeddings.local.local_tables import LocalTables
from embeddings.shards import SHARDINGS, Shard, TablePlan, place

# eps is large enough that the sign of a gradient near 0, which float32 rounds, decides nothing
OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=0.05, weight_decay=0.1),
    "adagrad": RowAdagrad(learning_rate=0.1, weight_decay=0.1, eps=1e-2),
    "rowwise": RowWiseAdagrad(learning_rate=0.1, eps=1e-3),
    "adam": RowAdam(learning_rate=0.02, eps=1e-2),
    "lamb": RowLamb(learning_rate=0.02, eps=1e-2, weight_decay=0.1),
    "partial lamb": RowLamb(learning_rate=0.02, eps=1e-2, partial=True),
    "touched lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="touched"),
    "partial touched lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="touched", partial=True, weight_decay=0.1),
    "table lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="table", weight_decay=0.1),
    "partial table lamb": RowLamb(learning_rate=0.02, eps=1e-2, trust="table", partial=True),
    "cowclip": RowCowClip(learning_rate=0.02, eps=1e-2, clip=0.2, l2=0.02),
    "lazy cowclip": RowCowClip(learning_rate=0.02, eps=1e-2, clip=0.2, l2=0.02, l2_mode="lazy"),
}
# over three ranks, 1 and 2 samples leave ranks without any, and of the others few divide
BATCHES = [7, 4, 1, 5, 2, 9, 12, 1, 6, 8] * 2
STEPS = len(BATCHES)
NO_IDS = 11  # the step whose bags are all empty
RUNS = {name: (name,) for name in list(OPTIMIZERS)[:8]} | {"all at once": tuple(OPTIMIZERS)}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def configs_of(run: str) -> list[TableConfig]:
    """Tables named by how they are cut; dims and numbers of rows that do not divide, two rows over three ranks."""
    configs = []
    for optimizer in RUNS[run]:
        common = {"optimizer": OPTIMIZERS[optimizer], "init_scale": 0.5}
        for kind in SHARDINGS:
            name = f"{kind}, {optimizer}"
            configs += [
                TableConfig(name=f"{name}, sum", num_rows=37, dim=5, features=(f"{name} x", f"{name} y"), **common),
                TableConfig(name=f"{name}, mean", num_rows=23, dim=8, pooling="mean", **common),
            ]
        configs.append(TableConfig(name=f"row_wise, {optimizer}, tiny", num_rows=2, dim=3, **common))
    return configs


def cut(config: TableConfig, count: int) -> TablePlan:
    """As its name says. Over two ranks a grid is a chessboard; over three, its columns do not have the same rows."""
    kind, ranks = config.name.split(",")[0], list(range(count))
    if kind == "grid" and count == 2:
        rows, columns = config.num_rows // 3, config.dim // 2
        edges = [(0, rows), (rows, config.num_rows - rows)], [(0, columns), (columns, config.dim - columns)]
        fields = ("first_row", "num_rows", "first_column", "num_columns")
        shards = [
            Shard(table=config.name, rank=(i + j) % 2, **dict(zip(fields, (*row, *column), strict=True)))
            for i, row in enumerate(edges[0])
            for j, column in enumerate(edges[1])
        ]
        return TablePlan(table=config.name, sharding="grid", shards=tuple(shards))
    on = {"table_wise": ranks[-1:], "table_row_wise": ranks[-2:]}.get(kind, ranks)
    return place(config, kind, on, ranks_per_node=2)


def plan_of(configs: list[TableConfig], count: int, *, nodes: bool) -> ShardingPlan:
    """`nodes`: as if each rank had a machine of its own, so that vectors go over the network."""
    tables = tuple(cut(config, count) for config in configs)
    return ShardingPlan(ranks=count, ranks_per_node=1 if nodes else count, tables=tables)


@dataclass
class Drawn:
    """A global batch: ids and weights by feature and bag, and what pooled vectors are trained towards."""

    ids: dict[str, list[NDArray[np.int64]]]
    weights: dict[str, list[NDArray[np.float64]]]
    targets: NDArray[np.float32]

    def keyed(self, first: int, last: int, *, weighted: bool) -> KeyedJaggedTensor:
        bags = [bag for its in self.ids.values() for bag in its[first:last]]
        scales = [bag for its in self.weights.values() for bag in its[first:last]]
        return KeyedJaggedTensor(
            keys=list(self.ids),
            values=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *bags])),
            lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int64),
            weights=torch.from_numpy(np.concatenate([np.empty(0), *scales])).float() if weighted else None,
        )


def draw(configs: list[TableConfig], step: int) -> Drawn:
    random, batch = np.random.default_rng(step), BATCHES[step]
    features = {name: config for config in reversed(configs) for name in config.features}
    longest = 0 if step == NO_IDS else 4
    ids = {
        name: [random.integers(0, config.num_rows, random.integers(0, longest + 1)) for _ in range(batch)]
        for name, config in features.items()
    }
    weights = {name: [random.normal(1, 0.5, len(bag)) for bag in bags] for name, bags in ids.items()}
    width = sum(config.dim * len(config.features) for config in configs)
    return Drawn(ids=ids, weights=weights, targets=random.normal(size=(batch, width)).astype(np.float32))


def factors_of(configs: list[TableConfig], step: int) -> list[float]:
    """Another learning rate of each of three tables in a row."""
    return [(1 - table % 3 / 4) / (1 + step / 10) for table in range(len(configs))]


def eps_factor(step: int) -> float:
    return 3.0 if step % 3 == 2 else 1.0


def train(tables: Tables, ranks: Ranks, configs: list[TableConfig], *, weighted: bool) -> list[NDArray[np.float32]]:
    """Trains on this rank's samples, one batch ahead of itself; gives what was pooled."""
    drawn = [draw(configs, step) for step in range(STEPS)]
    shares = [ranks.share_of(batch) for batch in BATCHES]
    batches = [d.keyed(first, first + n, weighted=weighted) for d, (first, n) in zip(drawn, shares, strict=True)]
    pooled = []
    for step, (first, samples) in enumerate(shares):
        tables.set_learning_rate_factors(factors_of(configs, step))
        tables.set_eps_factor(eps_factor(step))
        out = tables(batches[step]).values()
        if step % 4 < 3 and step + 1 < STEPS:
            tables.prefetch(batches[step + 1])
        target = torch.from_numpy(drawn[step].targets[first : first + samples])
        ((out - target).square().sum() / BATCHES[step]).backward()
        pooled.append(out.detach().numpy())
    return pooled


Held = list[tuple[str, slice, slice, NDArray[Any], dict[str, NDArray[Any]]]]


def held_by(tables: Tables) -> Held:
    def describe(r: TableRows) -> tuple[str, slice, slice, NDArray[Any], dict[str, NDArray[Any]]]:
        rows, columns = r.weight.shape
        where = slice(r.first_row, r.first_row + rows), slice(r.first_column, r.first_column + columns)
        return r.config.name, *where, r.weight.numpy().copy(), {k: v.numpy().copy() for k, v in r.state.items()}

    return [describe(rows) for rows in tables.rows()]


def run_of(index: int, nodes: bool) -> dict[str, bool]:
    """Weighted or not: every other run over memory, and the others over the network."""
    return {"weighted": (index % 2 == 1) != nodes}


def train_all(rank: int, count: int) -> dict[tuple[str, bool], Any]:
    """Every run over shared memory and over the network, in one process per rank: starting it takes longer."""
    from embeddings.sharded.sharded_tables import ShardedTables

    ranks, results = Ranks(rank=rank, count=count), {}
    for nodes in (False, True):
        for index, run in enumerate(RUNS):
            configs = configs_of(run)
            tables = ShardedTables(configs, plan=plan_of(configs, count, nodes=nodes), seed=3)
            start = held_by(tables)
            pooled = train(tables, ranks, configs, **run_of(index, nodes))
            results[run, nodes] = (start, pooled, held_by(tables), type(tables._rows._vectors).__name__)
    results["dense", False] = train_network(ranks)
    return results


def train_plain(plain_table: Any, whole: LocalTables, configs: list[TableConfig], *, weighted: bool) -> list[Any]:
    tables = [
        plain_table(r.config, r.weight.double().numpy(), {k: v.double().numpy() for k, v in r.state.items() if v.ndim})
        for r in whole.rows()
    ]
    for step, batch in enumerate(BATCHES):
        drawn, column = draw(configs, step), 0
        for table, factor in zip(tables, factors_of(configs, step), strict=True):
            gradients = []
            for pooled in table.look_up(drawn, weighted=weighted):
                target = drawn.targets[:, column : column + table.config.dim]
                gradients.append(2 * (pooled - target) / batch)
                column += table.config.dim
            table.update(gradients, factor, eps_factor(step))
    return tables


@cache
def train_alone(
    plain_table: Any, run: str, nodes: bool
) -> tuple[dict[str, Any], list[NDArray[np.float32]], dict[str, Any], Any]:
    """One process: rows at the start, what was pooled, rows and states at the end; and the plain tables."""
    configs, settings = configs_of(run), run_of(list(RUNS).index(run), nodes)
    whole = LocalTables(configs, seed=3)
    begun = {name: weight for name, *_, weight, _ in held_by(whole)}
    plain = {table.config.name: table for table in train_plain(plain_table, whole, configs, **settings)}
    pooled = train(whole, ALONE, configs, **settings)
    return begun, pooled, {name: (weight, state) for name, *_, weight, state in held_by(whole)}, plain


@pytest.fixture(scope="module", params=[2, 3])
def over_ranks(request: pytest.FixtureRequest, run_ranks: Any) -> list[dict[tuple[str, bool], Any]]:
    results: list[dict[tuple[str, bool], Any]] = run_ranks(train_all, request.param, seconds=240)
    return results


@pytest.mark.parametrize("nodes", [False, True], ids=["memory", "network"])
@pytest.mark.parametrize("run", RUNS)
def test_ranks_train_the_rows_of_one_process(over_ranks, plain_table, run, nodes):
    begun, expected, trained, plain = train_alone(plain_table, run, nodes)
    for step, pooled in enumerate(expected):
        found = np.concatenate([results[run, nodes][1][step] for results in over_ranks])
        np.testing.assert_allclose(found, pooled, **CLOSE, err_msg=f"step {step}")
    numbers = dict.fromkeys(trained, 0)
    for results in over_ranks:
        starts, _, ends, exchange = results[run, nodes]
        assert exchange == ("NetworkExchange" if nodes else "NodeMemory")
        for (name, rows, columns, start, _), (_, _, _, end, state) in zip(starts, ends, strict=True):
            numbers[name] += end.size
            np.testing.assert_array_equal(start, begun[name][rows, columns], name)
            np.testing.assert_allclose(end, trained[name][0][rows, columns], **CLOSE, err_msg=name)
            np.testing.assert_allclose(end, plain[name].w[rows, columns], **CLOSE, err_msg=name)
            assert state.keys() == trained[name][1].keys()
            for key, kept in state.items():
                where = (rows, columns)[: kept.ndim]
                np.testing.assert_allclose(kept, trained[name][1][key][where], **CLOSE, err_msg=f"{name} {key}")
                wanted = plain[name].state[key][where] if kept.ndim else STEPS
                np.testing.assert_allclose(kept, wanted, **CLOSE, err_msg=f"{name} {key}")
    for name, weight in begun.items():
        assert numbers[name] == weight.size * (len(over_ranks) if "replicated" in name else 1), name


@pytest.mark.parametrize("nodes", [False, True], ids=["memory", "network"])
def test_what_several_ranks_hold_is_the_same_on_all_to_the_last_bit(over_ranks, nodes):
    for run in RUNS:
        kept: dict[tuple[Any, ...], Any] = {}
        for results in over_ranks:
            for name, rows, columns, weight, states in results[run, nodes][2]:
                own = {key: state for key, state in states.items() if state.ndim == 1}  # one number per row of columns
                own |= {"": weight} if "replicated" in name else {}
                for key, state in own.items():
                    first = kept.setdefault((name, rows.start, rows.stop, key), state)
                    np.testing.assert_array_equal(state, first, f"{name} {key} {columns}")
        assert kept


def train_network(ranks: Ranks) -> tuple[list[float], dict[str, NDArray[np.float32]], Held]:
    """Trains a click network with all kinds of tables under one LAMB for dense weights; losses, weights and rows."""
    torch.manual_seed(0)
    configs = [
        TableConfig(name=f"{kind}, {name}", num_rows=31, dim=4, optimizer=OPTIMIZERS[name], init_scale=0.5)
        for kind, name in zip(SHARDINGS, OPTIMIZERS, strict=False)
    ]
    plan = plan_of(configs, ranks.count, nodes=False) if ranks.count > 1 else None
    model = DLRM(num_numeric=3, tables=configs, dim=4, bottom=(8,), top=(8,), plan=plan)
    parameters = list(model.parameters())
    step = TrainStep(
        ClickTask(model),
        Lamb(parameters, lr=0.02, eps=1e-3),
        reducer=DenseReducer(parameters, ranks) if ranks.count > 1 else None,
    )
    random, losses, samples = np.random.default_rng(0), [], 0
    for number, size in enumerate(BATCHES):
        first, own = ranks.share_of(size)
        mine = slice(first, first + own)
        batch = Batch(
            dense=torch.from_numpy(random.normal(size=(size, 3))).float()[mine],
            sparse=draw(configs, number).keyed(first, first + own, weighted=False),
            labels=torch.from_numpy(random.integers(0, 2, size)).float()[mine],
            rows=torch.arange(size)[mine],
            global_size=size,
        )
        samples += size
        losses.append(step(batch, samples))
    return losses, {name: p.detach().numpy() for name, p in model.named_parameters()}, held_by(model.tables)


def test_dense_weights_and_rows_of_a_network_are_those_of_one_process(over_ranks):
    losses, weights, held = train_network(ALONE)
    rows = {name: (weight, state) for name, *_, weight, state in held}
    for results in over_ranks:
        found = results["dense", False]
        np.testing.assert_allclose(found[0], losses, **CLOSE)
        for name, weight in weights.items():
            np.testing.assert_allclose(found[1][name], weight, **CLOSE, err_msg=name)
            np.testing.assert_array_equal(found[1][name], over_ranks[0]["dense", False][1][name], name)
        for name, its_rows, columns, end, _ in found[2]:
            np.testing.assert_allclose(end, rows[name][0][its_rows, columns], **CLOSE, err_msg=name)

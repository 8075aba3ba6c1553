"""What travels between ranks: bytes as computed, sixteen bits within their bounds, wrong ids told to all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.distributed.ranks import Ranks
from embeddings import (
    IdOutOfRangeError,
    RowAdam,
    RowCowClip,
    RowLamb,
    RowSGD,
    RowWiseAdagrad,
    ShardingPlan,
    TableConfig,
)
from embeddings.interface import Tables
from embeddings.local.local_rows import Bags
from embeddings.local.local_tables import LocalTables
from embeddings.sharded.exchanged_bytes import Batch, expected_bytes
from embeddings.sharded.id_exchange import IdExchange
from embeddings.sharded.lanes import lay_lanes
from embeddings.sharded.sharded_tables import ShardedTables
from embeddings.sharded.vector_exchange import NetworkExchange
from embeddings.shards import SHARDINGS, Sharding, place
from embeddings.tables import OtherRanksIdError

COUNT = 3
OPTIMIZERS = {
    "sgd": RowSGD(learning_rate=1.0),
    "rowwise": RowWiseAdagrad(learning_rate=0.1),
    "adam": RowAdam(learning_rate=0.02),
    "lamb": RowLamb(learning_rate=0.02),
    "partial lamb": RowLamb(learning_rate=0.02, partial=True),
    "touched lamb": RowLamb(learning_rate=0.02, trust="touched"),
    "partial touched lamb": RowLamb(learning_rate=0.02, trust="touched", partial=True),
    "table lamb": RowLamb(learning_rate=0.02, trust="table"),
    "cowclip": RowCowClip(learning_rate=0.02),
    "lazy cowclip": RowCowClip(learning_rate=0.02, l2_mode="lazy"),
}
# sharding of all tables (None: of each another), type that travels, whether over the network, weighted
Case = tuple[Sharding | None, str, bool, bool]
CASES: list[Case] = [
    *((kind, "fp32", nodes, (number % 2 == 1) != nodes) for number, kind in enumerate(SHARDINGS) for nodes in (0, 1)),
    (None, "fp32", False, True),
    (None, "fp32", True, False),
    (None, "fp16", False, False),
    (None, "bf16", True, True),
]
NUMBERS = {
    "gradients of a large batch": (1e-9, 1e-3),
    "tiny": (1e-36, 1e-30),
    "huge": (1e20, 1e37),
    "all magnitudes": (1e-30, 1e30),
    "zeros": (0.0, 0.0),
}


def describe(dim: int = 6) -> list[TableConfig]:
    return [
        TableConfig(
            name=name,
            num_rows=61 + 10 * number,
            dim=dim + number,
            features=(f"{name} x", f"{name} y") if number % 2 else (),
            pooling="mean" if number % 3 == 1 else "sum",
            optimizer=rule,
        )
        for number, (name, rule) in enumerate(OPTIMIZERS.items())
    ]


def plan_of(configs: list[TableConfig], kind: Sharding | None, *, nodes: bool) -> ShardingPlan:
    tables = []
    for number, config in enumerate(configs):
        own = kind or SHARDINGS[number % len(SHARDINGS)]
        on = {"table_wise": [number % 3], "table_row_wise": [1, 2]}.get(own, [*range(COUNT)])
        tables.append(place(config, own, on, ranks_per_node=2))
    return ShardingPlan(ranks=COUNT, ranks_per_node=1 if nodes else COUNT, tables=tuple(tables))


def draw(configs: list[TableConfig], seed: int, size: int, longest: int) -> list[Batch]:
    """Each rank's share of a batch; bags of `longest` ids or none where that is 1, and else of up to as many."""
    random, shares = (
        np.random.default_rng(seed),
        [Ranks(rank=rank, count=COUNT).share_of(size) for rank in range(COUNT)],
    )
    batches: list[dict[str, Any]] = [{} for _ in shares]
    for config in configs:
        for name in config.features:
            lengths = random.integers(0, longest + 1, size)
            ids = np.split(random.integers(0, config.num_rows, lengths.sum()), lengths.cumsum()[:-1])
            for batch, (first, count) in zip(batches, shares, strict=True):
                own = [np.empty(0, np.int64), *ids[first : first + count]]
                batch[name] = np.concatenate(own), lengths[first : first + count]
    return batches


def keyed(batch: Batch, *, weighted: bool = False) -> KeyedJaggedTensor:
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in batch.values()]))
    return KeyedJaggedTensor(
        keys=list(batch),
        values=ids,
        lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in batch.values()])),
        weights=(ids % 7).float() / 3 if weighted else None,
    )


def count_bytes(rank: int) -> dict[Case, list[Any]]:
    """What training steps send, as counted and as computed."""
    found: dict[Case, list[Any]] = {}
    for kind, exchange, nodes, weighted in CASES:
        configs = describe()
        plan = plan_of(configs, kind, nodes=nodes)
        tables = ShardedTables(configs, plan=plan, exchange=exchange)
        found[kind, exchange, nodes, weighted] = pairs = []
        for seed, (size, longest) in enumerate([(20, 4), (2, 1), (31, 1)]):  # one id per bag needs no lengths
            batches = draw(configs, seed, size, longest)
            before = dict(tables.bytes_sent)
            tables(keyed(batches[rank], weighted=weighted)).values().sum().backward()
            counted = {name: sent - before[name] for name, sent in tables.bytes_sent.items()}
            wanted = expected_bytes(configs, plan, batches, exchange=exchange, weighted=weighted)
            pairs.append((counted, wanted[rank]))
    return found


def send_numbers(rank: int) -> dict[tuple[str, str], tuple[NDArray[np.float32], ...]]:
    """Sends numbers of given magnitudes as vectors, and what arrived back as gradients."""
    config = TableConfig(name="a", num_rows=COUNT, dim=64)
    plan = ShardingPlan(ranks=COUNT, ranks_per_node=1, tables=(place(config, "row_wise", range(COUNT)),))
    lanes, found = lay_lanes([config], plan), {}
    for exchange in ("fp16", "bf16"):
        network = NetworkExchange(lanes, rank, exchange)
        cells = np.full((COUNT, 1), 20)
        places = network.lay(cells[:, 0], cells, np.zeros(COUNT, np.int64))
        for name, (low, high) in NUMBERS.items():
            numbers, random = network.open(places), np.random.default_rng(rank)
            logs = random.uniform(np.log(low or 1), np.log(high or 1), places.size)
            numbers.copy_(torch.from_numpy(np.exp(logs) * random.choice([-1, 1], places.size) * (high > 0)))
            sent = numbers.numpy().copy()
            network.send_vectors(numbers, places)
            arrived = numbers.numpy().copy()
            network.send_gradients(numbers, places)
            found[exchange, name] = (sent, arrived, numbers.numpy().copy())
    return found


def train_on_tiny_gradients(rank: int) -> dict[str, NDArray[np.float64]]:
    """How far gradients of 1e-9 move rows of SGD, by the type that travels; all that was looked up was 1e-9 apart."""
    moved = {}
    for exchange in ("fp32", "fp16", "bf16"):
        configs = [TableConfig(name="a", num_rows=50, dim=8, optimizer=OPTIMIZERS["sgd"], init_scale=1e-9)]
        tables = ShardedTables(configs, plan=plan_of(configs, "row_wise", nodes=True), exchange=exchange)
        rows = next(tables.rows()).weight
        before = rows.double()
        out = tables(keyed(draw(configs, 0, 30, 1)[rank])).values()
        (out * 1e-9 * torch.linspace(1, 2, out.numel()).view_as(out)).sum().backward()
        moved[exchange] = (rows.double() - before).numpy()
    return moved


def ask_for_far_rows(rank: int) -> tuple[list[int], list[int]]:
    """Asks for rows of a table with more than 32 bits count; returns what this rank was asked for, and should be."""
    config = TableConfig(name="a", num_rows=COUNT << 32, dim=2)
    plan = ShardingPlan(ranks=COUNT, ranks_per_node=1, tables=(place(config, "row_wise", range(COUNT)),))
    exchange = IdExchange(lay_lanes([config], plan), rank)
    drawn = [np.random.default_rng(r).integers(0, config.num_rows, 50) for r in range(COUNT)]
    segments = np.array([[0, 0, 25, 0, 2]])
    bags = Bags(ids=torch.from_numpy(drawn[rank]), offsets=torch.arange(26) * 2, weights=None, segments=segments)
    request = exchange.begin(bags)
    ids, _, _ = exchange.finish(request)
    batches = [{"a": (ids, np.full(25, 2))} for ids in drawn]
    counted = [request.num_bytes, expected_bytes([config], plan, batches)[rank]["ids"]]
    return ids.tolist() + counted[:1], [int(i) % (1 << 32) for ids in drawn for i in ids if i >> 32 == rank] + counted[
        1:
    ]


def ask_for_wrong_ids(rank: int) -> list[Any]:
    """One rank asks for what there is not, ahead of time or not; what all are told, and whether anything changed."""
    configs = describe()
    tables = ShardedTables(configs, plan=plan_of(configs, None, nodes=False))
    good, wrong = keyed(draw(configs, 1, 9, 3)[rank]), keyed(draw(configs, 2, 9, 3)[rank])
    if rank == 1:
        wrong.values()[-1] = 10**6
    told: list[Any] = []
    for is_ahead in (False, True):
        pooled = tables(good).values()
        if is_ahead:
            tables.prefetch(wrong)
        pooled.sum().backward()
        before = {key: tensor.clone() for key, tensor in tables.state_dict().items()}
        try:
            tables(wrong)
        except (IdOutOfRangeError, OtherRanksIdError) as error:
            told.append((type(error).__name__, str(error)))
        told.append(all(torch.equal(tensor, before[key]) for key, tensor in tables.state_dict().items()))
    tables(good).values().sum().backward()  # and all can go on
    return told


def train_sixteen_bit_rows(rank: int | None) -> list[Any]:
    """Trains rows of 16 bits by gradients that do not depend on them, here (None: of the whole batch) or over ranks."""
    configs = [
        TableConfig(name=f"{kind} {row_type}", num_rows=31, dim=6, optimizer=OPTIMIZERS["rowwise"], row_type=row_type)
        for kind in SHARDINGS
        for row_type in ("bf16", "fp16")
    ]
    kinds = [config.name.split()[0] for config in configs]
    tables: Tables = LocalTables(configs, seed=3)
    if rank is not None:
        placed = [plan_of([c], kind, nodes=False).tables[0] for c, kind in zip(configs, kinds, strict=True)]
        tables = ShardedTables(configs, plan=ShardingPlan(ranks=3, ranks_per_node=3, tables=tuple(placed)), seed=3)
    size = 12
    first, count = (0, size) if rank is None else Ranks(rank=rank, count=COUNT).share_of(size)
    for seed in range(5):
        shares = draw(configs, seed, size, 3)
        whole = {
            name: tuple(np.concatenate(own) for own in zip(*(b[name] for b in shares), strict=True))
            for name in shares[0]
        }
        out = tables(keyed(whole if rank is None else shares[rank])).values()
        slopes = np.random.default_rng(seed).normal(size=(size, out.shape[1])).astype(np.float32)
        (out * torch.from_numpy(slopes[first : first + count])).sum().backward()
    return [(r.config.name, r.first_row, r.first_column, r.weight.float().numpy()) for r in tables.rows()]


def do_everything(rank: int, count: int) -> dict[str, Any]:
    assert count == COUNT
    work = (count_bytes, send_numbers, train_on_tiny_gradients, ask_for_far_rows, ask_for_wrong_ids)
    work += (train_sixteen_bit_rows,)
    return {function.__name__: function(rank) for function in work}


@pytest.fixture(scope="module")
def results(run_ranks: Any) -> list[dict[str, Any]]:
    done: list[dict[str, Any]] = run_ranks(do_everything, COUNT, seconds=240)
    return done


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_sent_are_those_computed(results, case):
    for result in results:
        for counted, wanted in result["count_bytes"][case]:
            assert counted == wanted
    sent = [counted for result in results for counted, _ in result["count_bytes"][case]]
    sums = sum(counted["sums"] for counted in sent)
    assert (sums > 0) == (case[0] not in ("table_wise", "replicated"))
    assert (sum(counted["rows"] for counted in sent) > 0) == (case[0] != "replicated")


def assert_rounded(got: NDArray[np.float32], message: NDArray[np.float32], exchange: str, times: int) -> None:
    exact, largest = message.astype(np.float64), float(np.abs(message).max())
    # half a unit in the last place; below the largest times 2**-28, fp16 has steps of the largest times 2**-38
    bound = np.abs(exact) * 2.0**-8 if exchange == "bf16" else np.abs(exact) * 2.0**-11 + largest * 2.0**-39
    assert np.isfinite(got).all()
    assert (np.abs(got - exact) <= times * bound * 1.01).all()
    assert got.any() == (largest > 0)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("exchange", ["fp16", "bf16"])
def test_sixteen_bits_are_within_their_bounds(results, exchange, name):
    size, others = 20 * 64, COUNT - 1
    exchanged = [result["send_numbers"][exchange, name] for result in results]
    for rank, (sent, arrived, returned) in enumerate(exchanged):
        own = slice(others * size, (others + 1) * size)  # lies after what others asked; it is not rounded
        np.testing.assert_array_equal(arrived[own], sent[own])
        np.testing.assert_array_equal(returned[own], sent[own])
        for number, other in enumerate(r for r in range(COUNT) if r != rank):
            mine, its = number * size, (rank - (other < rank)) * size  # of each, among what they were asked for
            message = exchanged[other][0][its : its + size]
            assert_rounded(arrived[(others + 1 + number) * size :][:size], message, exchange, 1)
            assert_rounded(returned[mine : mine + size], sent[mine : mine + size], exchange, 2)


def test_tiny_gradients_move_rows_through_sixteen_bits(results):
    for result in results:
        exact = result["train_on_tiny_gradients"]["fp32"]
        assert np.abs(exact).max() > 1e-11
        for exchange, relative in (("fp16", 2.0**-9), ("bf16", 2.0**-6)):
            moved = result["train_on_tiny_gradients"][exchange]
            assert (np.abs(moved - exact) <= relative * np.abs(exact).max()).all()
            assert ((moved != 0) == (exact != 0)).all()


def test_rows_of_sixteen_bits_are_rounded_as_in_one_process(results):
    whole = {name: weight for name, _, _, weight in train_sixteen_bit_rows(None)}
    for result in results:
        for name, row, column, weight in result["train_sixteen_bit_rows"]:
            expected = whole[name][row : row + weight.shape[0], column : column + weight.shape[1]]
            # sums in another order may differ in float32's last bit, and one number in hundreds be rounded otherwise
            assert (weight != expected).mean() < 0.02, name
            np.testing.assert_allclose(weight, expected, rtol=0.02, atol=1e-3, err_msg=name)


def test_ids_of_more_rows_than_32_bits_count(results):
    for result in results:
        found, expected = result["ask_for_far_rows"]
        assert found == expected
    assert max(found) > 1 << 31


def test_a_wrong_id_is_one_line_on_all_ranks_and_changes_nothing(results):
    mine = "feature 'lazy cowclip y', row 2 of the batch: expected an id in [0, 151) for table"
    for rank, result in enumerate(results):
        told = result["ask_for_wrong_ids"]
        assert len(told) == 4
        assert told[1] is told[3] is True
        for kind, line in (told[0], told[2]):
            assert kind == ("IdOutOfRangeError" if rank == 1 else "OtherRanksIdError")
            assert "\n" not in line
            if rank == 1:
                assert line.startswith(mine)
            else:
                assert line == "batch: expected ids inside their tables on all ranks, got others on rank 1"

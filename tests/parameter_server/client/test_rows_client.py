"""A client and real shards, within the process and over gRPC: what was pushed is what is pulled, wherever it lies."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from embeddings.kernels.routing_kernels import find_disorder
from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server import wire
from parameter_server.client.frame_cutting import Order, Push, cut_piece
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.routes_source import FixedRoutes
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, RefusedError
from parameter_server.partition import Routes, buckets_of, salt_of, spread_evenly
from parameter_server.processes.rows_service import add_rows_service, make_server
from parameter_server.security.security import ServerSecurity
from parameter_server.shard.shard import Shard
from parameter_server.transports import GrpcConnection, LocalConnection, ShardConnection
from parameter_server.wire import Type

ROWS, DIM, SALT = 1000, 8, salt_of("a")
LANE = LaneLease(0, 1)


def describe() -> RunDescription:
    sgd = RowSGD(learning_rate=1.0)
    tables = tuple(
        TableConfig(name=name, num_rows=ROWS, dim=DIM, optimizer=sgd, init_scale=0.0) for name in ("a", "b", "c")
    )
    return RunDescription(run_id=5, seed=1, tables=tables, durability="none")


@pytest.fixture(params=["local", "grpc"])
def connect(request) -> Iterator[tuple]:
    """Two shards, routes to them, and how to connect."""
    shards = [Shard(describe(), number) for number in range(2)]
    with ExitStack() as stack:
        addresses = {number: f"local:{number}" for number in range(2)}
        if request.param == "grpc":
            for number, shard in enumerate(shards):
                server = make_server()
                stack.callback(lambda server=server: server.stop(0).wait())
                addresses[number] = ServerSecurity().listen(server, "localhost:0")
                add_rows_service(server, shard)
                server.start()
        routes = Routes(epoch=1, owners=spread_evenly([0, 1]), addresses=addresses)
        for shard in shards:
            shard.set_routes(routes)
        yield (
            FixedRoutes(routes),
            GrpcConnection if request.param == "grpc" else lambda a: LocalConnection(shards[int(a[6:])]),
            shards,
        )
        for shard in shards:
            shard.close()


@pytest.mark.parametrize("value_type", ["fp32", "fp16"])
def test_what_is_pushed_is_pulled(connect, value_type) -> None:
    routes, opened, shards = connect
    client = RowsClient(describe(), routes, opened, value_type=value_type)
    random, truth = np.random.default_rng(0), np.zeros((3, ROWS, DIM), np.float32)
    for clock in range(1, 11):
        given = []
        for table in range(3):
            ids = random.choice(ROWS, random.integers(0, 300), replace=False)
            gradients = random.integers(-3, 4, (ids.size, DIM)).astype(np.float32)
            truth[table, ids] -= gradients
            given.append(Push(table, ids, gradients))
        client.push(LANE, clock, given)
    client.wait()
    for ids in (np.arange(ROWS), random.permutation(ROWS), np.array([5, 5, 1]), np.empty(0, np.int64)):
        pulled = client.pull([(table, ids) for table in (2, 0)]).result(timeout=20)
        for table, its in zip((2, 0), pulled, strict=True):
            np.testing.assert_array_equal(its.rows, truth[table, ids])
            assert its.rows.dtype == np.float32
            assert its.versions == {n: shards[n].versions[table] for n in its.versions}
    assert client.pull([]).result(timeout=20) == []
    client.close()


def test_small_tables_share_a_call_and_large_ones_are_cut(connect, monkeypatch) -> None:
    routes, opened, _ = connect
    monkeypatch.setattr("parameter_server.client.frame_cutting.MAX_FRAME_BYTES", 2000)
    monkeypatch.setattr("parameter_server.client.pull_sender.MAX_FRAME_BYTES", 4000)
    monkeypatch.setattr("parameter_server.client.push_streams.MAX_FRAME_BYTES", 4000)
    calls: list[int] = []

    def counted(address: str) -> ShardConnection:
        connection = opened(address)
        for verb in ("push", "pull"):
            call = getattr(connection, verb)
            monkeypatch.setattr(connection, verb, lambda m, call=call: (calls.append(len(m)), call(m))[1])
        return connection

    client = RowsClient(describe(), routes, counted)
    few, many = np.arange(10), np.arange(ROWS)
    client.push(LANE, 1, [Push(table, few, np.ones((10, DIM), np.float32)) for table in range(3)])
    client.wait()
    client.pull([(table, few) for table in range(3)]).result(timeout=20)
    assert len(calls) == 4
    calls.clear()
    client.push(LANE, 2, [Push(0, many, np.ones((ROWS, DIM), np.float32))])
    client.wait()
    expected = np.where(many[:, None] < 10, -2.0, -1.0) * np.ones(DIM)
    np.testing.assert_array_equal(client.pull([(0, many)]).result(timeout=20)[0].rows, expected)
    assert len(calls) > 20
    assert max(calls) <= 4000 + 200
    client.close()


@pytest.mark.parametrize(
    ("value_type", "ids", "value", "reason"),
    [
        ("fp32", [7, 9], np.nan, "push to table 'b', id 9: expected a finite gradient, got nan"),
        ("fp16", [7, 9], np.inf, "push to table 'b', id 9: expected a finite gradient, got inf"),
        ("fp16", [7, 9], 7e4, "id 9: expected gradients within 65504, as they travel as fp16, got 70000"),
        ("fp32", [9, 9], 1.0, "push to table 'b': expected each id once, got 9 twice"),
    ],
)
def test_what_cannot_be_pushed_is_said_at_once_and_nothing_is_sent(connect, value_type, ids, value, reason) -> None:
    routes, opened, shards = connect
    client = RowsClient(describe(), routes, opened, value_type=value_type)
    gradients = np.full((2, DIM), 1.0, np.float32)
    gradients[1, 3] = value
    with pytest.raises(ValueError, match=reason):
        client.push(LANE, 1, [Push(1, np.array(ids), gradients)])
    client.push(LANE, 1, [Push(1, np.array([1]), gradients[:1])]).result(timeout=20)
    assert sum(shard.counts.pushes for shard in shards) == 1
    with pytest.raises(ValueError, match=r"lane 0: expected a clock and table above \(1, 1\), got \(1, 0\)"):
        client.push(LANE, 1, [Push(0, np.array([1]), gradients[:1])])
    client.close()


def test_an_id_of_no_table_fails_its_call_alone(connect) -> None:
    routes, opened, _ = connect
    client = RowsClient(describe(), routes, opened)
    with pytest.raises(RefusedError, match=r"table 'a': expected ids in \[0, 1000\), got 1000"):
        client.pull([(0, np.array([3, ROWS]))]).result(timeout=20)
    assert client.pull([(0, np.array([3]))]).result(timeout=20)[0].rows.shape == (1, DIM)
    before = {thread for thread in threading.enumerate() if thread.name.startswith(("rows-client", "local", "routes"))}
    client.close()
    assert before
    assert not {thread for thread in before if thread.is_alive()}


def test_a_closed_client_says_so(connect) -> None:
    routes, opened, _ = connect
    client = RowsClient(describe(), routes, opened)
    client.close()
    with pytest.raises(ConnectionLost, match="closed"):
        client.pull([(0, np.array([3]))]).result(timeout=20)
    with pytest.raises(ConnectionLost, match="closed"):
        client.push(LANE, 1, [Push(0, np.array([3]), np.ones((1, DIM), np.float32))])


def test_shards_without_rows_of_a_push_hear_of_its_clock(connect) -> None:
    routes, opened, shards = connect
    client = RowsClient(describe(), routes, opened)
    pushes = [
        [],
        [Push(1, np.array([3]), np.ones((1, DIM), np.float32))],
        [Push(2, np.empty(0, int), np.ones((0, DIM)))],
    ]
    for clock, given in enumerate(pushes, 1):
        client.push(LANE, clock, given).result(timeout=20)
    client.close()
    assert [shard._state.orders.clocks for shard in shards] == [3, 3]
    assert sum(sum(shard.num_rows) for shard in shards) == 1
    assert sum(shard.counts.staleness.sum() for shard in shards) == 1  # nothing else came of a pull


@pytest.mark.parametrize("n", [0, 1, 3000])
def test_rows_travel_by_shard_and_hash_and_buckets_stay_whole(n, monkeypatch) -> None:
    monkeypatch.setattr("parameter_server.client.frame_cutting.MAX_FRAME_BYTES", 3000)
    random = np.random.default_rng(n)
    owners = random.integers(0, 3, 4096).astype(np.int32)
    order = Order(Routes(epoch=4, owners=owners, addresses=dict.fromkeys(range(3), "local:0")))
    ids = random.choice(1 << 40, n, replace=False)
    gradients = np.repeat(ids[:, None] % 1000, DIM, axis=1).astype(np.float32)
    counts = (1 + ids % 9).astype(np.uint32)
    seen: list[np.ndarray] = []
    for piece in order.split(Push(0, ids, gradients, counts=counts), "a", SALT, Type.FP16):
        parts = list(cut_piece(piece))
        for part in parts:
            buckets = buckets_of(part.ids, SALT)
            assert set(owners[buckets]) == {piece.shard}
            assert find_disorder(part.ids, SALT) < 0
            np.testing.assert_array_equal(part.values[:, 0], part.ids % 1000)
            np.testing.assert_array_equal(part.counts, 1 + part.ids % 9)
            kind = {"has_ids": True, "has_values": True, "has_counts": True}
            assert wire.frame_bytes(len(part.ids), DIM, Type.FP16, **kind) <= 3000
        edges = [(buckets_of(part.ids[:1], SALT)[0], buckets_of(part.ids[-1:], SALT)[0]) for part in parts]
        assert all(last[1] < first[0] for last, first in itertools.pairwise(edges))
        seen += [part.ids for part in parts]
    assert sorted(np.concatenate([*seen, ids[:0]]).tolist()) == sorted(ids.tolist())
    places = order.split_places(ids, SALT)
    assert sorted(np.concatenate([*(its for _, its in places), ids[:0]]).tolist()) == list(range(n))
    assert all(set(owners[buckets_of(ids[its], SALT)]) == {shard} for shard, its in places)


def test_disorder_and_numbers_that_are_none_are_found() -> None:
    from embeddings.kernels.routing_kernels import find_not_finite

    ids = np.array([3, 3])
    assert find_disorder(ids, SALT) == 1
    for dtype in ("f4", "f2"):
        for wrong in (np.nan, np.inf, -np.inf):
            for row in (0, 4, 8):
                values = np.full((9, 3), -60000, dtype)
                assert find_not_finite(values) == -1
                values[row, row % 3] = wrong
                assert find_not_finite(values) == row

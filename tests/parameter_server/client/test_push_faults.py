"""Pushes are applied exactly once, whatever a connection does to them, and wherever their rows have gone meanwhile.

Shards are a model here: plain dictionaries with the promises that shards make, and nothing of the real ones' code.
Gradients are whole numbers, so that the sum of all pushes says exactly which were applied, and how often.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.client import retries
from parameter_server.client.rows_client import LaneLease, Push, RowsClient
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, LaneLostError, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Routes, buckets_of, salt_of, spread_evenly
from parameter_server.shard.shard import Shard
from parameter_server.wire import Flag, Header, Op, decode, encode, join

NAMES, DIM, ROWS = ("a", "b", "c"), 4, 400
SALTS = [salt_of(name) for name in NAMES]
HOUSE = threading.RLock()  # what a move does to two shards happens at once


def describe(durability: str = "journal") -> RunDescription:
    sgd = RowSGD(learning_rate=1.0)
    tables = tuple(TableConfig(name=name, num_rows=ROWS, dim=DIM, optimizer=sgd) for name in NAMES)
    return RunDescription(run_id=7, seed=1, tables=tables, durability=durability)


class ModelShard:
    """What a shard promises, row by row."""

    def __init__(self, routes: Routes, number: int) -> None:
        self.number, self.mine = number, routes.owned_by(number)
        self.frozen = np.zeros(4096, bool)
        self.rows: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(DIM))
        self.marks: dict[tuple[int, int], int] = defaultdict(int)
        self.orders: dict[int, tuple[int, int, tuple[int, int]]] = {}
        self.most_frames = 0

    def push(self, message: bytes) -> bytes:
        with HOUSE:
            parts, frames = [], decode(message)
            assert len({frame.header.clock for frame in frames}) == 1
            self.most_frames = max(self.most_frames, len(frames))
            for frame in frames:
                try:
                    flag = self.apply(frame)
                except RefusedError:
                    if not parts:
                        raise
                    break
                parts.append(encode(frame.header._replace(flags=Flag.REPLY | flag, n=0, version=1)))
            return join(parts)

    def apply(self, frame) -> int:
        head = frame.header
        lease, expected, cut = self.orders.get(head.lane, (-1, 1, (0, 0)))
        if head.lease < lease:
            raise RefusedError(Refusal.FAILED_PRECONDITION, f"lease {lease}")
        if head.lease > lease:
            expected, cut = 1, (0, 0)
        if head.seq > expected:
            raise RefusedError(Refusal.OUT_OF_RANGE, "gap", expected_seq=expected)
        if head.seq < expected:
            return Flag.DUPLICATE
        if (head.route_epoch, head.codec) < cut:
            raise RefusedError(Refusal.FAILED_PRECONDITION, "sent again in another form", moved=True)
        buckets = buckets_of(frame.ids, SALTS[head.table])
        if not self.mine[buckets].all():
            raise RefusedError(Refusal.FAILED_PRECONDITION, "moved", moved=True)
        if self.frozen[buckets].any():
            raise RefusedError(Refusal.UNAVAILABLE, "frozen", retry_after_seconds=0.002)
        stamp = head.clock * len(NAMES) + head.table
        fresh = [self.marks[head.lane, int(bucket)] < stamp for bucket in buckets]
        for id, gradient, is_fresh in zip(frame.ids.tolist(), frame.values, fresh, strict=True):
            if is_fresh:
                self.rows[head.table, id] -= gradient
        for bucket in buckets:
            key = head.lane, int(bucket)
            self.marks[key] = max(self.marks[key], stamp)
        self.orders[head.lane] = (head.lease, expected + 1, (head.route_epoch, head.codec))
        return 0

    def give(self, other: ModelShard, buckets: np.ndarray) -> None:
        """Moves rows and marks."""
        self.mine, other.mine = self.mine & ~buckets, other.mine | buckets
        for table, id in list(self.rows):
            if buckets[buckets_of(np.array([id]), SALTS[table])[0]]:
                other.rows[table, id] = self.rows.pop((table, id))
        for lane, bucket in list(self.marks):
            if buckets[bucket]:
                other.marks[lane, bucket] = self.marks.pop((lane, bucket))

    def forget(self, saved: tuple) -> None:
        """Is killed, and comes back as it was once saved."""
        rows, marks, orders = saved
        self.rows, self.marks = defaultdict(lambda: np.zeros(DIM), rows), defaultdict(int, marks)
        self.orders = dict(orders)

    def save(self) -> tuple:
        return {key: row.copy() for key, row in self.rows.items()}, dict(self.marks), dict(self.orders)


class BadConnection:
    """Loses, delays, repeats and overtakes, from a seed."""

    def __init__(self, shard: ModelShard, seed: int, rate: float) -> None:
        self.shard, self.rate = shard, rate
        self.random = random.Random(seed)
        self.pool = ThreadPoolExecutor(4)
        self.late: list[Future] = []
        self.is_dead = False

    def push(self, message: bytes) -> Future[bytes]:
        return self.pool.submit(self.treat, message, self.random.random(), self.random.random() * 0.002)

    def treat(self, message: bytes, fate: float, seconds: float) -> bytes:
        if self.is_dead:
            raise ConnectionLost("dead")
        fate /= self.rate or 1e-9
        time.sleep(seconds)
        if fate < 0.3:
            raise ConnectionLost("lost on the way there")
        if fate < 0.4:
            raise RefusedError(Refusal.RESOURCE_EXHAUSTED, "full", retry_after_seconds=0.001)
        if fate < 0.6:  # given up here, and applied there a little later
            self.late.append(self.pool.submit(self.push_late, message, seconds * 3))
            raise ConnectionLost("expired")
        reply = self.shard.push(message)
        if fate < 0.8:
            self.late.append(self.pool.submit(self.push_late, message, seconds))
        if fate < 0.9:
            raise ConnectionLost("lost on the way back")
        if fate < 1.0:
            return reply[:-1]  # damaged on the way back
        return reply

    def push_late(self, message: bytes, seconds: float) -> None:
        time.sleep(seconds)
        with contextlib.suppress(RefusedError):
            self.shard.push(message)

    def close(self) -> None:
        self.pool.shutdown()


class Places:
    """Routes that change."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes

    def current(self) -> Routes:
        return self.routes

    def newer_than(self, epoch: int) -> Routes:
        for _ in range(20):
            if self.routes.epoch > epoch:
                break
            time.sleep(0.001)
        return self.routes


class World:
    """Three model shards, bad connections to them, a client, and what the tables should hold."""

    def __init__(self, seed: int, rate: float, description: RunDescription, **settings) -> None:
        self.random = np.random.default_rng(seed)
        addresses = {number: f"local:{number}" for number in range(3)}
        self.routes = Places(Routes(epoch=1, owners=spread_evenly([0, 1, 2]), addresses=addresses))
        self.shards = [ModelShard(self.routes.routes, number) for number in range(3)]
        self.opened: list[BadConnection] = []
        self.rate, self.seed = rate, seed
        self.client = RowsClient(description, self.routes, self.connect, **settings)
        self.truth = np.zeros((3, ROWS, DIM))

    def connect(self, address: str) -> BadConnection:
        number = int(address.partition(":")[2])
        self.opened.append(BadConnection(self.shards[number], self.seed * 3 + number, self.rate))
        return self.opened[-1]

    def push(self, lane: LaneLease, clock: int) -> Future[None]:
        given = []
        for table in range(3):
            ids = self.random.choice(ROWS, self.random.integers(0, 120), replace=False)
            gradients = self.random.integers(-3, 4, (ids.size, DIM)).astype(np.float32)
            self.truth[table, ids] -= gradients
            given.append(Push(table, ids, gradients))
        return self.client.push(lane, clock, given)

    def move(self, source: int, target: int, share: float) -> None:
        buckets = self.shards[source].mine & (self.random.random(4096) < share)
        self.shards[source].frozen = buckets
        time.sleep(0.003)
        with HOUSE:
            self.shards[source].give(self.shards[target], buckets)
            owners = np.where(buckets, target, self.routes.routes.owners).astype(np.int32)
            old = self.routes.routes
            self.routes.routes = Routes(epoch=old.epoch + 1, owners=owners, addresses=old.addresses)
        self.shards[source].frozen = np.zeros(4096, bool)

    def table(self) -> np.ndarray:
        found = np.zeros_like(self.truth)
        for shard in self.shards:
            for (table, id), row in shard.rows.items():
                found[table, id] = row
        return found

    def close(self) -> None:
        self.client.close()
        for connection in self.opened:
            connection.close()


@pytest.fixture
def make_world(monkeypatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(retries, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(retries, "LONGEST_SECONDS", 0.01)
    worlds: list[World] = []

    def make(*args, **settings) -> World:
        worlds.append(World(*args, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.mark.parametrize("seed", range(4))
def test_pushes_are_applied_once_while_connections_fail_and_buckets_move(make_world, seed) -> None:
    world = make_world(seed, 0.4, describe(), max_in_flight=4)
    lanes = [LaneLease(3, 1), LaneLease(9, 5)]
    for clock in range(1, 41):
        for lane in lanes:
            world.push(lane, clock)
        if clock % 5 == 0:
            source, target = world.random.choice(3, 2, replace=False)
            world.move(int(source), int(target), float(world.random.choice([0.2, 1.0])))
    world.client.wait()
    assert world.client.unacknowledged == 0
    np.testing.assert_array_equal(world.table(), world.truth)
    assert max(shard.most_frames for shard in world.shards) >= 3  # a clock's tables share messages


def test_without_faults_each_push_is_one_message_per_shard(make_world) -> None:
    world = make_world(0, 0.0, describe(), max_in_flight=1)
    for clock in range(1, 6):
        world.push(LaneLease(0, 1), clock).result(timeout=10)
    assert [shard.most_frames for shard in world.shards] == [3, 3, 3]
    np.testing.assert_array_equal(world.table(), world.truth)


def test_a_new_lease_computes_again_what_its_predecessor_left_and_nothing_counts_twice(make_world) -> None:
    world = make_world(1, 0.3, describe())
    first, second = LaneLease(4, 1), LaneLease(4, 2)
    pushes = []
    for clock in (1, 2, 3):
        ids = world.random.choice(ROWS, 50, replace=False)
        pushes.append(Push(1, ids, np.ones((50, DIM), np.float32)))
        world.client.push(first, clock, [pushes[-1]])
    world.client.wait()
    before = world.table()
    for clock, push in enumerate(pushes, 1):
        world.client.push(second, clock, [push])
    world.client.push(second, 4, [pushes[0]])
    world.client.wait()
    expected = before.copy()
    expected[1, pushes[0].ids] -= 1
    np.testing.assert_array_equal(world.table(), expected)
    with pytest.raises(ValueError, match="expected lease 2 of lane 4 or a later one, got 1"):
        world.client.push(first, 5, pushes[:1])


def test_a_lane_leased_to_somebody_else_is_given_up(make_world) -> None:
    world = make_world(2, 0.0, describe())
    for shard in world.shards:
        shard.orders[0] = (9, 1, (0, 0))
    failed = world.push(LaneLease(0, 8), 1)
    with pytest.raises(LaneLostError, match=r"shard \d at local:\d, lane 0, push 1: lease 9"):
        failed.result(timeout=10)
    assert isinstance(world.push(LaneLease(0, 8), 2).exception(timeout=10), LaneLostError)
    with pytest.raises(LaneLostError):
        world.client.wait()
    world.client.wait()  # said once
    assert not world.table().any()


def test_a_shard_that_came_back_without_some_pushes_loses_those_alone(make_world) -> None:
    world = make_world(3, 0.0, describe("snapshot"))
    lane = LaneLease(0, 1)
    for clock in range(1, 4):
        world.push(lane, clock)
    world.client.wait()
    saved = [shard.save() for shard in world.shards]
    for clock in range(4, 9):  # acknowledged, and lost by the first shard
        world.push(lane, clock)
    world.client.wait()
    kept = world.table()
    world.shards[0].forget(saved[0])
    lost = world.table() - kept
    assert lost.any()
    for clock in range(9, 12):
        world.push(lane, clock)
    world.client.wait()
    np.testing.assert_array_equal(world.table(), world.truth + lost)


def test_a_lease_ends_when_its_numberings_can_no_longer_be_told_apart(make_world) -> None:
    world = make_world(3, 0.0, describe("snapshot"))
    lane = LaneLease(0, 1)
    world.push(lane, 1).result(timeout=10)
    saved, forms = world.shards[0].save(), []
    world.push(lane, 2).result(timeout=10)
    for clock in range(3, 258):
        world.shards[0].forget(saved)  # the push before this is lost, and so the next is numbered anew
        world.push(lane, clock).result(timeout=10)
        forms.append(world.shards[0].orders[0][2])
    assert forms == [(1, numbering) for numbering in range(1, 256)]
    world.shards[0].forget(saved)
    with pytest.raises(LaneLostError, match=r"shard 0 at .*, lane 0, push .*: expected at most 255 times"):
        world.push(lane, 258).result(timeout=10)
    assert world.push(LaneLease(0, 2), 258).exception(timeout=10) is None


def test_a_shard_that_promised_to_lose_nothing_and_did_is_not_passed_over(make_world) -> None:
    world = make_world(3, 0.0, describe("journal"))
    for clock in range(1, 4):
        world.push(LaneLease(0, 1), clock)
    world.client.wait()
    world.shards[1].forget(({}, {}, {}))
    failed = world.push(LaneLease(0, 1), 4)
    assert "expected a shard that keeps what it has acknowledged" in str(failed.exception(timeout=10))


def test_a_shard_that_does_not_come_back_is_named(make_world) -> None:
    world = make_world(4, 0.0, describe(), deadline_seconds=0.1)
    world.push(LaneLease(0, 1), 1)
    world.client.wait()
    for connection in world.opened:
        connection.is_dead = True
    failed = world.push(LaneLease(0, 1), 2)
    expected = (
        r"shard \d at local:\d, lane 0, push \d: expected success within 0.1 s, got \d+ failures in .* s, .* dead"
    )
    with pytest.raises(ShardUnreachableError, match=expected):
        failed.result(timeout=10)


def test_a_push_waits_while_too_many_are_unacknowledged(make_world) -> None:
    world = make_world(5, 0.0, describe(), max_in_flight=2)
    with HOUSE:  # nothing is answered
        world.push(LaneLease(0, 1), 1)
        world.push(LaneLease(0, 1), 2)
        late = ThreadPoolExecutor(1)
        third = late.submit(world.push, LaneLease(0, 1), 3)
        time.sleep(0.05)
        assert not third.done()
        assert world.client.unacknowledged == 2
    third.result(timeout=10).result(timeout=10)
    late.shutdown()
    np.testing.assert_array_equal(world.table(), world.truth)


def test_closing_fails_what_is_under_way_and_leaves_no_threads(make_world) -> None:
    before = set(threading.enumerate())
    world = make_world(6, 0.0, describe())
    with HOUSE:
        pushed = world.push(LaneLease(0, 1), 1)
        closing = threading.Thread(target=world.client.close)
        closing.start()
        assert isinstance(pushed.exception(timeout=10), ConnectionLost)
    closing.join(timeout=10)
    with pytest.raises(ConnectionLost, match="closed"):
        world.push(LaneLease(0, 1), 2)
    world.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("shard_kind", ["model", "real"])
def test_what_comes_late_cannot_overtake_rows_whose_bucket_went_and_came_back(shard_kind) -> None:
    """Clocks 1 and 2 are lost; their bucket goes and comes back, so that they are queued again, behind what stayed."""
    addresses = {0: "local:0", 1: "local:1"}
    routes = Routes(epoch=3, owners=np.zeros(4096, np.int32), addresses=addresses)
    shard = ModelShard(routes, 0) if shard_kind == "model" else Shard(describe("none"), 0)
    if isinstance(shard, Shard):
        shard.set_routes(routes)
    went = np.array([5])

    def push(seq: int, clock: int, epoch: int, ids: np.ndarray) -> None:
        head = Header(op=Op.PUSH, run_id=7, table=0, lane=1, lease=1, seq=seq, clock=clock, route_epoch=epoch, dim=DIM)
        shard.push(join([encode(head, ids, np.ones((len(ids), DIM), np.float32))]))

    push(seq=1, clock=1, epoch=3, ids=went[:0])  # what stayed of the first, sent again
    with pytest.raises(RefusedError) as late:
        push(seq=2, clock=2, epoch=1, ids=went)  # the second, as it was sent before
    assert late.value.moved
    push(seq=2, clock=2, epoch=3, ids=went[:0])
    push(seq=3, clock=1, epoch=3, ids=went)
    push(seq=4, clock=2, epoch=3, ids=went)
    if isinstance(shard, Shard):
        assert shard.counts.pushed_rows == 2
        shard.close()
    else:
        assert shard.rows[0, 5].tolist() == [-2.0] * DIM

"""What tests of pushes share: a world of model shards, bad connections to them, and what their tables should hold.

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
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.partition import Routes, buckets_of, salt_of, spread_evenly
from parameter_server.wire import Flag, decode, encode, join

NAMES, DIM, ROWS = ("a", "b", "c"), 4, 400
SALTS = [salt_of(name) for name in NAMES]
HOUSE = threading.RLock()  # what a move does to two shards happens at once


def describe_run(durability: str = "journal") -> RunDescription:
    """Describes a run of three tables that a learning rate of 1 makes sums of."""
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

    house = HOUSE  # whoever holds it has nothing answered

    def __init__(self, seed: int, rate: float, durability: str = "journal", **settings) -> None:
        self.random = np.random.default_rng(seed)
        addresses = {number: f"local:{number}" for number in range(3)}
        self.routes = Places(Routes(epoch=1, owners=spread_evenly([0, 1, 2]), addresses=addresses))
        self.shards = [ModelShard(self.routes.routes, number) for number in range(3)]
        self.opened: list[BadConnection] = []
        self.rate, self.seed = rate, seed
        self.client = RowsClient(describe_run(durability), self.routes, self.connect, **settings)
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


@pytest.fixture
def describe() -> Callable[..., RunDescription]:
    """Describes the world's run, given its durability."""
    return describe_run


@pytest.fixture
def make_model_shard() -> type[ModelShard]:
    """Makes a model shard, given routes and its number."""
    return ModelShard

"""What tests of the feed share: shards whose rows are known, and readers of them that can be cut off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from embeddings.hashed.hashed_table import HashedTable
from embeddings.kernels.hash_kernels import NUM_BUCKETS
from embeddings.row_optimizers import RowAdam, RowWiseAdagrad
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.description import RunDescription
from parameter_server.feed.connections import LocalFeed
from parameter_server.feed.reader import FeedReader
from parameter_server.feed.tables import ServedTables
from parameter_server.partition import Routes, buckets_of, salt_of
from parameter_server.shard.changes import Changes

DESCRIPTION = RunDescription(
    run_id=77,
    seed=3,
    tables=(
        TableConfig(name="user", num_rows=UNBOUNDED, dim=4, optimizer=RowAdam(learning_rate=0.1), init_scale=0.5),
        TableConfig(name="item", num_rows=500, dim=3, optimizer=RowWiseAdagrad(learning_rate=0.1)),
    ),
)
SALTS = [salt_of(table.name) for table in DESCRIPTION.tables]
EVERYWHERE = np.ones(NUM_BUCKETS, np.bool_)
SECONDS = 0.02


class SomeShard:
    """Tables, and which buckets of them count: what the feed knows of a shard."""

    def __init__(self, number: int) -> None:
        self.description, self.number, self.lock = DESCRIPTION, number, threading.Lock()
        self.history = 1
        self.evictions_since = 0
        self.claims = np.zeros(NUM_BUCKETS, np.int64)
        self.route_epoch = 0
        self.gone: list[dict[int, int]] = [{} for _ in SALTS]  # by id, the version at which it was evicted
        self.tables = [
            HashedTable(config, seed=DESCRIPTION.seed, salt=salt)
            for config, salt in zip(DESCRIPTION.tables, SALTS, strict=True)
        ]

    def changes(self, table: int, since: int, buckets: np.ndarray | None) -> Changes:
        with self.lock:
            held = self.tables[table]
            mask = (self.claims > 0) & (buckets if buckets is not None else False)
            ids, rows = held.take(buckets=mask, since=since)
            evicted = np.array([id for id, version in self.gone[table].items() if version > since], np.int64)
            evicted = evicted[mask[buckets_of(evicted, SALTS[table])]]
            weights = np.ascontiguousarray(rows[:, : held.config.dim])
            numbers = (held.version, self.route_epoch, self.claims.copy(), held.num_rows)
            return Changes(*numbers, ids, weights, np.sort(evicted), self.evictions_since)

    def set_routes(self, routes: Routes) -> None:
        with self.lock:
            mine = routes.owned_by(self.number)
            self.claims[mine & (self.claims == 0)] = routes.epoch
            self.claims[~mine] = 0
            self.route_epoch = routes.epoch

    def push(self, draw: np.random.Generator, rows: int = 50) -> None:
        with self.lock:
            for table, held in enumerate(self.tables):
                ids = np.unique(draw.integers(0, 500, rows))
                ids = ids[self.claims[buckets_of(ids, SALTS[table])] > 0]
                gradients = draw.normal(size=(ids.size, held.config.dim)).astype(np.float32)
                held.push(ids, gradients, updates=held.version + 1, now=time.time())
                for id in ids.tolist():
                    self.gone[table].pop(id, None)

    def evict(self, table: int, ids: np.ndarray) -> None:
        with self.lock:
            held = self.tables[table]
            there = np.intersect1d(ids, held.take().ids)
            held.count_change()
            held.remove(there)
            self.gone[table] |= dict.fromkeys(there.tolist(), held.version)


class Cluster:
    """Two shards, their routes, and readers."""

    def __init__(self) -> None:
        self.shards = {0: SomeShard(0), 1: SomeShard(1)}
        self.draw = np.random.default_rng(5)
        self.cut_after: int | None = None  # messages
        self.connections: list[CutFeed] = []
        self.changed = threading.Condition()
        self.routes = Routes(epoch=0, owners=np.zeros(NUM_BUCKETS, np.int32), addresses={0: "local:0", 1: "local:1"})
        self.set_owners(np.arange(NUM_BUCKETS, dtype=np.int32) % 2)

    def set_owners(self, owners: np.ndarray) -> None:
        with self.changed:
            addresses = {number: f"local:{number}" for number in self.shards}
            self.routes = Routes(epoch=self.routes.epoch + 1, owners=owners, addresses=addresses)
            self.changed.notify_all()
        for shard in self.shards.values():
            shard.set_routes(self.routes)

    def move(self, giver: int, taker: int, buckets: np.ndarray) -> None:
        mask = np.zeros(NUM_BUCKETS, np.bool_)
        mask[buckets] = True
        mask &= self.routes.owners == giver
        for there, here in zip(self.shards[giver].tables, self.shards[taker].tables, strict=True):
            here.put(there.take(buckets=mask))  # with versions that mean nothing there
        self.set_owners(np.where(mask, taker, self.routes.owners).astype(np.int32))
        for there in self.shards[giver].tables:
            there.drop(mask)

    def push(self, times: int = 1) -> None:
        for _ in range(times):
            for shard in self.shards.values():
                shard.push(self.draw)

    def current(self) -> Routes:
        with self.changed:
            return self.routes

    def newer_than(self, epoch: int) -> Routes:
        with self.changed:
            assert self.changed.wait_for(lambda: self.routes.epoch > epoch, 10)
            return self.routes

    def connect(self, address: str) -> CutFeed:
        shard = self.shards[int(address.partition(":")[2])]
        self.connections.append(CutFeed(LocalFeed(shard, history=shard.history), self.cut_after))
        return self.connections[-1]

    def begin_shard(self, number: int) -> SomeShard:
        return SomeShard(number)

    def read(self) -> tuple[FeedReader, ServedTables]:
        served = ServedTables(DESCRIPTION)
        return FeedReader(DESCRIPTION, self, self.connect, served, seconds=SECONDS), served

    @staticmethod
    def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.01)

    def assert_equal(self, reader: FeedReader, served: ServedTables) -> None:
        """The reader comes to hold exactly the shards' rows, and looks up what a pull of them would give."""

        def is_there() -> bool:
            shards = self.shards.items()
            return reader.delay_seconds < 1 and all(
                reader.versions(number) == tuple(table.version for table in shard.tables) for number, shard in shards
            )

        self.wait_for(is_there)
        self.wait_for(lambda: reader.wait(SECONDS, 1))  # and another pass, in which what was read whole is completed
        for table, config in enumerate(DESCRIPTION.tables):
            everything = np.arange(500)
            expected = np.empty((500, config.dim), np.float32)
            rows = 0
            for number, shard in self.shards.items():
                mine = self.routes.owners[buckets_of(everything, SALTS[table])] == number
                some = np.empty((int(mine.sum()), config.dim), np.float32)
                shard.tables[table].pull(everything[mine], some)
                expected[mine] = some
                rows += shard.tables[table].take(buckets=self.routes.owners == number).ids.size
            assert served.num_rows[table] == rows
            assert (served.look_up(table, everything) == expected).all()
            assert (served.look_up(config.name, everything[::-1]) == expected[::-1]).all()


class CutFeed:
    """A feed that ends after some messages."""

    def __init__(self, feed: LocalFeed, after: int | None) -> None:
        self.feed, self.after, self.num_bytes = feed, after, 0

    def follow(self, request: bytes) -> Iterator[bytes]:
        for count, message in enumerate(self.feed.follow(request)):
            if count == self.after:
                return
            self.num_bytes += len(message)
            yield message

    def close(self) -> None:
        self.feed.close()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Two shards without rows, and readers that try again at once."""
    monkeypatch.setattr("parameter_server.feed.reader._RETRY_SECONDS", 0.01)
    return Cluster()

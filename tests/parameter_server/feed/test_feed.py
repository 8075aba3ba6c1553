"""A reader's rows become those of the shards, bit for bit: begun late, cut off, after evictions, moves and restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from embeddings.hashed.hashed_table import HashedTable
from embeddings.kernels.hash_kernels import NUM_BUCKETS
from embeddings.row_optimizers import RowAdam, RowWiseAdagrad
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.description import RunDescription
from parameter_server.errors import RefusedError
from parameter_server.feed.connections import LocalFeed
from parameter_server.feed.messages import FeedRequest, pack_buckets
from parameter_server.feed.reader import FeedReader
from parameter_server.feed.service import Changes, FeedSession
from parameter_server.feed.tables import ServedTables
from parameter_server.partition import Routes, buckets_of, salt_of

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
    monkeypatch.setattr("parameter_server.feed.reader._RETRY_SECONDS", 0.01)
    return Cluster()


def read(cluster: Cluster) -> tuple[FeedReader, ServedTables]:
    served = ServedTables(DESCRIPTION)
    return FeedReader(DESCRIPTION, cluster, cluster.connect, served, seconds=SECONDS), served


def wait_for(is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_equal(cluster: Cluster, reader: FeedReader, served: ServedTables) -> None:
    """The reader comes to hold exactly the shards' rows, and looks up what a pull of them would give."""

    def is_there() -> bool:
        shards = cluster.shards.items()
        return reader.delay_seconds < 1 and all(
            reader.versions(number) == tuple(table.version for table in shard.tables) for number, shard in shards
        )

    wait_for(is_there)
    wait_for(lambda: reader.wait(SECONDS, 1))  # and another pass, in which what was read whole is completed
    for table, config in enumerate(DESCRIPTION.tables):
        everything = np.arange(500)
        expected = np.empty((500, config.dim), np.float32)
        rows = 0
        for number, shard in cluster.shards.items():
            mine = cluster.routes.owners[buckets_of(everything, SALTS[table])] == number
            some = np.empty((int(mine.sum()), config.dim), np.float32)
            shard.tables[table].pull(everything[mine], some)
            expected[mine] = some
            rows += shard.tables[table].take(buckets=cluster.routes.owners == number).ids.size
        assert served.num_rows[table] == rows
        assert (served.look_up(table, everything) == expected).all()
        assert (served.look_up(config.name, everything[::-1]) == expected[::-1]).all()


def test_a_reader_that_begins_late_has_all_rows_and_births(cluster: Cluster) -> None:
    cluster.push(5)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        assert 0 < sum(served.num_rows) < 1000, "all rows or none: nothing is born at a lookup"
        sizes = [connection.num_bytes for connection in cluster.connections]
        cluster.push()
        assert_equal(cluster, reader, served)
        more = [connection.num_bytes for connection in cluster.connections]
    assert all(second - first < first for first, second in zip(sizes, more, strict=True)), "all was read again"


def test_big_tables_are_told_in_parts(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parameter_server.feed.service.ROWS_AT_ONCE", 40)
    monkeypatch.setattr("parameter_server.feed.service.MAX_FRAME_BYTES", 300)
    cluster.push(5)
    reader, served = read(cluster)
    with reader:
        cluster.push(5)
        assert_equal(cluster, reader, served)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_a_reader_that_is_cut_off_goes_on(cluster: Cluster, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parameter_server.feed.service.ROWS_AT_ONCE", 100)
    cluster.push(2)
    reader, served = read(cluster)
    cluster.cut_after = after
    with reader:
        for connection in list(cluster.connections):
            connection.close()
        for _ in range(10):
            cluster.push()
            cluster.shards[0].evict(0, np.arange(20))
            time.sleep(0.01)
        cluster.cut_after = None
        assert_equal(cluster, reader, served)
    assert len(cluster.connections) > 3


def test_evicted_rows_go_and_may_come_back(cluster: Cluster) -> None:
    cluster.push(5)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        before = sum(served.num_rows)
        for shard in cluster.shards.values():
            shard.evict(0, np.arange(250))
            shard.evict(1, np.arange(100, 400))
        assert_equal(cluster, reader, served)
        assert sum(served.num_rows) < before
        cluster.push(3)
        assert_equal(cluster, reader, served)


def test_a_reader_that_was_away_for_too_long_reads_all_anew(cluster: Cluster) -> None:
    cluster.push(3)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        shard = cluster.shards[0]
        with shard.lock:  # no pass can see it
            held = shard.tables[0]
            held.count_change()
            assert held.remove(held.take().ids[:20]) == 20
            held.count_change()
            shard.evictions_since = held.version
        assert_equal(cluster, reader, served)


@pytest.mark.parametrize("seed", range(4))
def test_moved_rows_are_not_lost_and_old_ones_do_not_come_back(cluster: Cluster, seed: int) -> None:
    draw = np.random.default_rng(seed)
    cluster.push(3)
    reader, served = read(cluster)
    with reader:
        for _ in range(12):
            giver = int(draw.integers(2))
            cluster.move(giver, 1 - giver, draw.integers(0, NUM_BUCKETS, 1500))
            if draw.random() < 0.5:  # there and back before a pass sees it
                back = draw.integers(0, NUM_BUCKETS, 3000)
                cluster.push()
                cluster.shards[1 - giver].evict(0, draw.integers(0, 500, 100))
                cluster.move(1 - giver, giver, back)
            cluster.push()
            time.sleep(draw.random() * 0.04)
        assert_equal(cluster, reader, served)


def test_a_shard_that_does_not_know_what_it_gave_away_is_not_believed(cluster: Cluster) -> None:
    cluster.push(3)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        giver = cluster.shards[0]
        old_routes, old_rows = cluster.routes, [table.take() for table in giver.tables]
        cluster.move(0, 1, np.arange(NUM_BUCKETS))
        cluster.push(3)
        assert_equal(cluster, reader, served)
        for table, rows in zip(giver.tables, old_rows, strict=True):
            table.put(rows)
        giver.history += 1
        giver.set_routes(old_routes)
        seen = len(cluster.connections)
        for connection in list(cluster.connections):
            connection.close()
        wait_for(lambda: len(cluster.connections) > seen + 1)
        cluster.push()
        wait_for(lambda: reader.versions(0) == tuple(table.version for table in giver.tables))
        giver.set_routes(cluster.routes)
        for table in giver.tables:
            table.drop(EVERYWHERE)
        assert_equal(cluster, reader, served)


def test_a_new_shard_is_followed_and_a_drained_one_left(cluster: Cluster) -> None:
    cluster.push(3)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        cluster.shards[2] = SomeShard(2)
        cluster.set_owners(cluster.routes.owners)
        cluster.move(0, 2, np.arange(NUM_BUCKETS))
        del cluster.shards[0]
        cluster.set_owners(cluster.routes.owners)
        cluster.push()
        assert_equal(cluster, reader, served)


def test_a_shard_that_starts_again_with_less_is_read_whole(cluster: Cluster) -> None:
    cluster.push(3)
    reader, served = read(cluster)
    with reader:
        assert_equal(cluster, reader, served)
        again = SomeShard(0)
        again.history = 2
        again.set_routes(cluster.routes)
        cluster.shards[0] = again
        for connection in list(cluster.connections):
            connection.close()
        for _ in range(6):  # beyond the version that the reader knows
            again.push(cluster.draw, rows=5)
        assert_equal(cluster, reader, served)


def test_the_reader_stays_within_its_delay_and_says_when_it_does_not(cluster: Cluster) -> None:
    reader, _ = read(cluster)
    with reader:
        assert reader.wait(0.5, 20)
        delays = []
        for _ in range(30):
            cluster.push()
            delays.append(reader.delay_seconds)
            time.sleep(0.01)
        assert 0 <= np.median(delays) < 0.3
        with cluster.shards[1].lock:  # a shard that tells nothing
            wait_for(lambda: reader.delay_seconds > 0.45)
            assert not reader.wait(0.3, 0)
        assert reader.wait(0.3, 20)


def test_a_wrong_request_is_refused_and_nothing_is_told() -> None:
    shard = SomeShard(0)
    right = FeedRequest(run_id=77, history=1, route_epoch=0, since=(0, 0), whole=pack_buckets(EVERYWHERE), seconds=0.1)
    assert FeedRequest.decode(right.encode()) == right
    wrong = [
        b"",
        b"[]",
        b"{}",
        b"\xff" * 30,
        b"[" * 50_000,
        b" " * 70_000,
        replace(right, whole="00").encode(),
        replace(right, seconds=0).encode(),
        replace(right, seconds=float("nan")).encode(),
        replace(right, since=(-1, 0)).encode(),
        replace(right, since=("a", 0)).encode(),  # type: ignore[arg-type]
        replace(right, run_id=True).encode(),
        right.encode().replace(b"77", b"77.5"),
    ]
    for message in wrong:
        with pytest.raises(RefusedError, match="feed: expected"):
            FeedRequest.decode(message)
    for request in (replace(right, run_id=78), replace(right, since=(0,)), replace(right, since=(0, 0, 0))):
        with pytest.raises(RefusedError, match="feed: expected"):
            FeedSession(shard, request, history=1)
    with pytest.raises(RefusedError, match="up to 0, got 9"):
        list(FeedSession(shard, replace(right, since=(9, 0)), history=1).messages())


def test_a_reader_outlives_errors_that_nobody_foresaw(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.push(3)
    of_target, of_connections = iter(range(3)), iter(range(3))

    class Stubborn(ServedTables):
        def put(self, table: int, ids: np.ndarray, weights: np.ndarray) -> None:
            if next(of_target, None) is not None:
                raise MemoryError("no room at the moment")
            super().put(table, ids, weights)

    def connect(address: str) -> CutFeed:
        if next(of_connections, None) is not None:
            raise OSError("no socket at the moment")
        return cluster.connect(address)

    served = Stubborn(DESCRIPTION)
    with FeedReader(DESCRIPTION, cluster, connect, served, seconds=SECONDS) as reader:
        assert_equal(cluster, reader, served)
    assert {"no socket at the moment", "no room at the moment"} == {
        str(r.exc_info[1]) for r in caplog.records if r.exc_info
    }

"""The feed over gRPC, of real shards: pushes, moves and restarts arrive, and a reader too many is told so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import numpy as np
import pytest

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from embeddings.row_optimizers import RowWiseAdagrad
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.client.rows_client import LaneLease, Push, RowsClient
from parameter_server.description import Growth, RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.feed.connections import GrpcFeed
from parameter_server.feed.messages import FeedRequest, pack_buckets
from parameter_server.feed.reader import FeedReader
from parameter_server.feed.service import MAX_READERS, add_feed_to
from parameter_server.feed.tables import ServedTables
from parameter_server.partition import Routes, spread_evenly
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

IDS = np.arange(-300, 300) * 1_000_003
SECONDS = 0.05


EVICT_AFTER_SECONDS = 1000


def describe() -> RunDescription:
    table = TableConfig(
        name="t", num_rows=UNBOUNDED, dim=5, init_scale=0.3, optimizer=RowWiseAdagrad(learning_rate=0.1)
    )
    growth = {"t": Growth(evict_after_seconds=EVICT_AFTER_SECONDS)}
    return RunDescription(run_id=9, seed=4, tables=(table,), growth=growth, durability="none")


class FedShard:
    """A shard whose feed is behind gRPC."""

    def __init__(self, number: int, address: str = "127.0.0.1:0") -> None:
        self.shard = Shard(describe(), number)
        self.pool = futures.ThreadPoolExecutor(MAX_READERS + 2)
        self.server = grpc.server(self.pool, options=[("grpc.so_reuseport", 0)])
        add_feed_to(self.server, self.shard)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(address)}"
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait()
        self.pool.shutdown()
        self.shard.close()


class Run:
    """Two shards, routes, and a client that pushes."""

    def __init__(self) -> None:
        self.shards = [FedShard(0), FedShard(1)]
        self.routes = Routes(epoch=1, owners=spread_evenly([0, 1]), addresses=self.addresses())
        for fed in self.shards:
            fed.shard.set_routes(self.routes)
        self.draw = np.random.default_rng(1)
        self.clock = 0
        self.client = RowsClient(describe(), self, self.connect)

    def addresses(self) -> dict[int, str]:
        return {number: fed.address for number, fed in enumerate(self.shards)}

    def current(self) -> Routes:
        return self.routes

    def newer_than(self, epoch: int) -> Routes:
        if self.routes.epoch <= epoch:
            time.sleep(0.02)
        return self.routes

    def connect(self, address: str) -> LocalConnection:
        return LocalConnection(next(fed.shard for fed in self.shards if fed.address == address))

    def push(self) -> None:
        self.clock += 1
        ids = np.unique(self.draw.choice(IDS, 100))
        gradients = self.draw.normal(size=(ids.size, 5)).astype(np.float32)
        self.client.push(LaneLease(0, 1), self.clock, [Push(0, ids, gradients)]).result(20)

    def move(self, giver: int, taker: int, buckets: np.ndarray) -> None:
        mask = np.zeros(NUM_BUCKETS, np.bool_)
        mask[buckets] = True
        mask &= self.routes.owners == giver
        there, here = self.shards[giver].shard, self.shards[taker].shard
        there.freeze(mask)
        here.put_buckets(mask, there.take_buckets(mask), is_last=True)
        owners = np.where(mask, taker, self.routes.owners).astype(np.int32)
        self.routes = Routes(epoch=self.routes.epoch + 1, owners=owners, addresses=self.addresses())
        here.set_routes(self.routes)
        there.set_routes(self.routes)
        there.drop_buckets(mask)

    def rows(self) -> np.ndarray:
        return self.client.pull([(0, IDS)]).result(20)[0].rows

    def close(self) -> None:
        self.client.close()
        for fed in self.shards:
            fed.stop()


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.close()


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_rows_arrive_over_grpc_while_buckets_move(run: Run) -> None:
    for _ in range(5):
        run.push()
    served = ServedTables(describe())
    with FeedReader(describe(), run, GrpcFeed, served, seconds=SECONDS) as reader:
        assert reader.wait(1.0, 20)
        assert (served.look_up("t", IDS) == run.rows()).all()
        for _ in range(6):
            giver = int(run.draw.integers(2))
            run.move(giver, 1 - giver, run.draw.integers(0, NUM_BUCKETS, 2000))
            run.push()
        wait_for(lambda: bool((served.look_up("t", IDS) == run.rows()).all()))
        assert served.num_rows[0] == sum(sum(fed.shard.num_rows) for fed in run.shards)


def test_evicted_rows_go_also_where_it_is_forgotten_which_they_were(run: Run) -> None:
    for _ in range(3):
        run.push()
    served = ServedTables(describe())
    with FeedReader(describe(), run, GrpcFeed, served, seconds=SECONDS) as reader:
        assert reader.wait(1.0, 20)
        assert served.num_rows[0] == sum(sum(fed.shard.num_rows) for fed in run.shards) > 0
        assert run.shards[0].shard.evict(time.time() + 2 * EVICT_AFTER_SECONDS) > 0
        wait_for(lambda: served.num_rows[0] == sum(run.shards[1].shard.num_rows))
        shard = run.shards[1].shard
        with shard._guarded.busy():  # no pass in between
            table = shard._state.tables[0]
            assert table.evict(time.time() + 2 * EVICT_AFTER_SECONDS) > 0
            table.forget_evicted(table.version + 1)
            table.count_change()
        wait_for(lambda: served.num_rows[0] == 0)
        assert (served.look_up(0, IDS) == run.rows()).all()


def test_served_tables_stay_as_large_as_their_rows() -> None:
    served = ServedTables(describe())
    sizes = []
    for first in range(0, 400_000, 2_000):
        ids = np.arange(first, first + 4_000)
        served.put(0, ids, np.zeros((ids.size, 5), np.float32))
        served.drop(0, ids[:2_000])
        sizes.append(served._tables[0].num_bytes)
    assert served.num_rows == [2_000]
    assert max(sizes[-20:]) < 1.5 * max(sizes[10:30])


def test_a_shard_that_is_away_is_waited_for_and_its_rows_stay(run: Run) -> None:
    run.push()
    served = ServedTables(describe())
    with FeedReader(describe(), run, GrpcFeed, served, seconds=SECONDS) as reader:
        assert reader.wait(1.0, 20)
        before = served.look_up(0, IDS)
        address = run.shards[0].address
        run.shards[0].stop()
        wait_for(lambda: reader.delay_seconds > 0.4)
        assert (served.look_up(0, IDS) == before).all()
        run.shards[0] = FedShard(0, address)  # which has kept nothing
        run.shards[0].shard.set_routes(run.routes)
        wait_for(lambda: reader.delay_seconds < 0.3)
        assert served.num_rows[0] == sum(run.shards[1].shard.num_rows)


def test_a_reader_too_many_is_refused(run: Run) -> None:
    request = FeedRequest(
        run_id=9, history=0, route_epoch=0, since=(0,), whole=pack_buckets(np.zeros(NUM_BUCKETS, np.bool_)), seconds=0.1
    )
    feeds = [GrpcFeed(run.shards[0].address) for _ in range(MAX_READERS + 1)]
    following = [feed.follow(request.encode()) for feed in feeds]
    for messages in following[:-1]:
        assert next(messages)
    with pytest.raises(RefusedError, match=f"at most {MAX_READERS} readers") as refused:
        next(following[-1])
    assert refused.value.refusal is Refusal.RESOURCE_EXHAUSTED
    feeds[0].close()

    def follow_again() -> bool:
        feed = GrpcFeed(run.shards[0].address)
        try:
            return bool(next(feed.follow(request.encode())))
        except RefusedError:
            return False
        finally:
            feed.close()

    wait_for(follow_again)  # the first one's place is free
    for feed in feeds:
        feed.close()


def test_a_wrong_request_is_refused_over_grpc(run: Run) -> None:
    feed = GrpcFeed(run.shards[0].address)
    with pytest.raises(RefusedError, match="expected a request") as refused:
        next(feed.follow(b"{}"))
    assert refused.value.refusal is Refusal.INVALID_ARGUMENT
    feed.close()

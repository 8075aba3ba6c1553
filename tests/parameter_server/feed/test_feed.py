"""A reader's rows become those of the shards, bit for bit: begun late, cut off, after evictions and errors."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.errors import RefusedError
from parameter_server.feed.messages import FeedRequest, pack_buckets
from parameter_server.feed.reader import FeedReader
from parameter_server.feed.service import FeedSession
from parameter_server.feed.tables import ServedTables

SECONDS = 0.02


def test_a_reader_that_begins_late_has_all_rows_and_births(cluster: Any) -> None:
    cluster.push(5)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        assert 0 < sum(served.num_rows) < 1000, "all rows or none: nothing is born at a lookup"
        sizes = [connection.num_bytes for connection in cluster.connections]
        cluster.push()
        cluster.assert_equal(reader, served)
        more = [connection.num_bytes for connection in cluster.connections]
    assert all(second - first < first for first, second in zip(sizes, more, strict=True)), "all was read again"


def test_big_tables_are_told_in_parts(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parameter_server.feed.service.ROWS_AT_ONCE", 40)
    monkeypatch.setattr("parameter_server.feed.service.MAX_FRAME_BYTES", 300)
    cluster.push(5)
    reader, served = cluster.read()
    with reader:
        cluster.push(5)
        cluster.assert_equal(reader, served)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_a_reader_that_is_cut_off_goes_on(cluster: Any, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parameter_server.feed.service.ROWS_AT_ONCE", 100)
    cluster.push(2)
    reader, served = cluster.read()
    cluster.cut_after = after
    with reader:
        for connection in list(cluster.connections):
            connection.close()
        for _ in range(10):
            cluster.push()
            cluster.shards[0].evict(0, np.arange(20))
            time.sleep(0.01)
        cluster.cut_after = None
        cluster.assert_equal(reader, served)
    assert len(cluster.connections) > 3


def test_evicted_rows_go_and_may_come_back(cluster: Any) -> None:
    cluster.push(5)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        before = sum(served.num_rows)
        for shard in cluster.shards.values():
            shard.evict(0, np.arange(250))
            shard.evict(1, np.arange(100, 400))
        cluster.assert_equal(reader, served)
        assert sum(served.num_rows) < before
        cluster.push(3)
        cluster.assert_equal(reader, served)


def test_a_reader_that_was_away_for_too_long_reads_all_anew(cluster: Any) -> None:
    cluster.push(3)
    reader, served = cluster.read()
    with reader:
        cluster.assert_equal(reader, served)
        shard = cluster.shards[0]
        with shard.lock:  # no pass can see it
            held = shard.tables[0]
            held.count_change()
            assert held.remove(held.take().ids[:20]) == 20
            held.count_change()
            shard.evictions_since = held.version
        cluster.assert_equal(reader, served)


def test_the_reader_stays_within_its_delay_and_says_when_it_does_not(cluster: Any) -> None:
    reader, _ = cluster.read()
    with reader:
        assert reader.wait(0.5, 20)
        delays = []
        for _ in range(30):
            cluster.push()
            delays.append(reader.delay_seconds)
            time.sleep(0.01)
        assert 0 <= np.median(delays) < 0.3
        with cluster.shards[1].lock:  # a shard that tells nothing
            cluster.wait_for(lambda: reader.delay_seconds > 0.45)
            assert not reader.wait(0.3, 0)
        assert reader.wait(0.3, 20)


def test_a_wrong_request_is_refused_and_nothing_is_told(cluster: Any) -> None:
    shard = cluster.begin_shard(0)
    right = FeedRequest(
        run_id=77,
        history=1,
        route_epoch=0,
        since=(0, 0),
        whole=pack_buckets(np.ones(NUM_BUCKETS, np.bool_)),
        seconds=0.1,
    )
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


def test_a_reader_outlives_errors_that_nobody_foresaw(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    cluster.push(3)
    of_target, of_connections = iter(range(3)), iter(range(3))

    class Stubborn(ServedTables):
        def put(self, table: int, ids: np.ndarray, weights: np.ndarray) -> None:
            if next(of_target, None) is not None:
                raise MemoryError("no room at the moment")
            super().put(table, ids, weights)

    def connect(address: str) -> Any:
        if next(of_connections, None) is not None:
            raise OSError("no socket at the moment")
        return cluster.connect(address)

    served = Stubborn(cluster.shards[0].description)
    with FeedReader(cluster.shards[0].description, cluster, connect, served, seconds=SECONDS) as reader:
        cluster.assert_equal(reader, served)
    assert {"no socket at the moment", "no room at the moment"} == {
        str(r.exc_info[1]) for r in caplog.records if r.exc_info
    }

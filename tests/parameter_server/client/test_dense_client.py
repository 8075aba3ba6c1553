"""An exchange of the dense part ends as if nothing had gone wrong, whatever is lost, repeated, moved or away."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from embeddings import RowSGD, TableConfig
from parameter_server.client.dense_client import DenseClient, Part, Place
from parameter_server.dense_codec import MAX_FRAME_PIECES, PIECE, PIECE_SALT, Combine, cut_pieces
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, LaneLostError, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Routes, buckets_of, spread_evenly
from parameter_server.shard.dense_pieces import DensePieces
from parameter_server.transports import LocalConnection
from parameter_server.wire import Flag, Op, decode, encode

NUMBER = 5 * PIECE + 7
LANE = 8


class Pieces:
    """A shard that holds nothing but pieces, and does what it is told to do wrong."""

    def __init__(self, number: int) -> None:
        table = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))
        self.description = RunDescription(run_id=7, seed=0, tables=(table,), lanes=8)
        self.pieces = DensePieces(self.description)
        self.number, self.mine = number, np.zeros(4096, bool)
        self.calls = 0

    def push_pull_dense(self, message: bytes) -> list[bytes | memoryview]:
        self.calls += 1
        (frame,) = decode(message)
        assert (frame.header.op, frame.header.run_id, frame.header.seq) == (Op.DENSE, 7, 0)
        if not self.mine[buckets_of(frame.ids, PIECE_SALT)].all():
            raise RefusedError(Refusal.FAILED_PRECONDITION, "moved: get newer routes", moved=True)
        flags = Flag.REPLY if self.pieces.changes(frame) else Flag.REPLY | Flag.DUPLICATE
        return encode(frame.header._replace(flags=flags), values=self.pieces.apply(frame))

    def pull(self, message: bytes) -> list[bytes | memoryview]:
        raise NotImplementedError

    push = pull


class Wire:
    """A connection that fails as a list says, from the first call on: "" passes."""

    def __init__(self, shard: Pieces, faults: Iterator[str]) -> None:
        self.inner, self.faults = LocalConnection(shard), faults

    def push_pull_dense(self, message: bytes) -> Future[bytes]:
        fault = next(self.faults, "")
        answer: Future[bytes] = Future()
        if fault == "lost":  # the request
            answer.set_exception(ConnectionLost("reset"))
            return answer
        if fault == "silent":
            return answer
        if fault in Refusal.__members__:
            answer.set_exception(RefusedError(Refusal[fault], "not now", retry_after_seconds=0.01))
            return answer
        try:
            reply = self.inner.push_pull_dense(message).result()
        except RefusedError as error:
            answer.set_exception(error)
            return answer
        if fault == "twice":
            again = self.inner.push_pull_dense(message).result()
            assert decode(again)[0].header.flags & Flag.DUPLICATE
        if fault == "answer lost":
            answer.set_exception(ConnectionLost("cut"))
        elif fault == "damaged":
            answer.set_result(reply[:-9] + b"\xff" + reply[-8:])
        else:
            answer.set_result(reply)
        return answer

    pull = push = push_pull_dense

    def close(self) -> None:
        self.inner.close()


class Cluster:
    """Shards, and routes that may change."""

    def __init__(self, count: int) -> None:
        self.shards = [Pieces(number) for number in range(count)]
        self.faults: dict[int, Iterator[str]] = {}
        self.epoch, self.known_epoch, self.said = 0, 1, []
        self.old: Routes | None = None
        self.set_owners(spread_evenly(range(count)))
        self.asked = threading.Event()

    def set_owners(self, owners: Any) -> None:
        self.epoch += 1
        self.routes = Routes(
            epoch=self.epoch, owners=owners, addresses={n: f"local:{n}" for n in range(len(self.shards))}
        )
        for shard in self.shards:
            shard.mine = self.routes.owned_by(shard.number)

    def current(self) -> Routes:
        return self.old or self.routes

    def newer_than(self, epoch: int) -> Routes:
        self.asked.set()
        self.old = None
        return self.routes

    def connect(self, address: str) -> Wire:
        number = int(address.removeprefix("local:"))
        return Wire(self.shards[number], self.faults.get(number, iter(())))

    def client(self, **settings: Any) -> closing[DenseClient]:
        return closing(
            DenseClient(7, self, self.connect, say=self.said.append, **({"deadline_seconds": 20} | settings))
        )

    def master(self) -> Any:
        found = np.zeros((6, PIECE), np.float32)
        for shard in self.shards:
            taken = shard.pieces.take(np.ones(4096, bool))
            found[taken["pieces"]] = taken["master"]
        return found


def vector(seed: int, number: int = NUMBER) -> Any:
    return cut_pieces(np.random.default_rng(seed).normal(size=number).astype(np.float32))


def part(combine: Combine, clock: int, values: Any, **settings: Any) -> Part:
    pieces = np.arange(6 if values is None else len(values), dtype=np.int64)
    return Part(combine=combine, place=Place(LANE, 1, clock), pieces=pieces, values=values, **settings)


def run(cluster: Cluster, **settings: Any) -> list[Any]:
    """Brings a master and exchanges with it three times; returns the answers and the master at the end."""
    with cluster.client(**settings) as client:
        found = client.exchange([part(Combine.SET_IF_ABSENT, 0, vector(0))], vector(0), NUMBER)
        for clock in (1, 2, 3):
            own = vector(clock)
            found += client.exchange([part(Combine.EASGD, clock, own, factor=0.25)], own, NUMBER)
        found += client.exchange([part(Combine.READ, 0, None)], vector(3), NUMBER)
    return [*found, cluster.master()]


FAULTS = {
    "lost requests": ["", "lost", "lost", "", "lost"],
    "lost answers": ["answer lost", "", "answer lost", "answer lost", "", "answer lost"],
    "damaged answers": ["", "damaged", "", "damaged"],
    "sent twice": ["twice"] * 5,
    "away for a moment": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "", "UNAVAILABLE", "DATA_LOSS"],
    "no answer": ["", "silent", "", "silent"],
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_faults_change_nothing(name: str, shards: int) -> None:
    expected = run(Cluster(1))
    cluster = Cluster(shards)
    cluster.faults = {number: iter(FAULTS[name]) for number in range(shards)}
    for found, its in zip(run(cluster, attempt_seconds=0.1), expected, strict=True):
        assert np.array_equal(found, its)
    assert not any(list(faults) for faults in cluster.faults.values())  # all of them happened


def test_pieces_are_found_again_after_a_move_and_exchanges_are_not_doubled() -> None:
    expected = run(Cluster(1))
    cluster, reversed_owners = Cluster(2), spread_evenly([1, 0])

    def move() -> Iterator[str]:
        yield ""
        yield from ("answer lost",) * 2  # of an exchange that shard 0 has applied, before its pieces move
        cluster.old = cluster.routes
        taken = [shard.pieces.take(np.ones(4096, bool)) for shard in cluster.shards]
        for shard, its in zip(cluster.shards, reversed(taken), strict=True):
            shard.pieces.drop(np.ones(4096, bool))
            shard.pieces.put(its)
        cluster.set_owners(reversed_owners)
        yield "answer lost"

    cluster.faults = {0: move()}
    for found, its in zip(run(cluster), expected, strict=True):
        assert np.array_equal(found, its)
    assert cluster.asked.is_set()
    assert cluster.epoch == 2


def test_a_shard_that_comes_back_at_another_address_is_found() -> None:
    cluster = Cluster(2)
    owners = np.zeros(4096, np.int32)
    cluster.set_owners(owners)
    cluster.old = Routes(epoch=1, owners=owners, addresses={0: "local:1"})
    cluster.faults = {1: itertools.repeat("lost")}  # nobody is there any more
    with cluster.client(deadline_seconds=5) as client:
        (found,) = client.exchange([part(Combine.SET_IF_ABSENT, 0, vector(0))], vector(0), NUMBER)
    assert np.array_equal(found, vector(0))
    assert cluster.asked.is_set()


def test_parts_of_one_exchange_are_combined_each_in_its_way() -> None:
    cluster, start, own = Cluster(2), vector(0), vector(1)
    with cluster.client() as client:
        client.exchange([part(Combine.SET_IF_ABSENT, 0, start)], start, NUMBER)
        first, second = part(Combine.EASGD, 1, own, factor=0.25), part(Combine.FOLLOW, 1, own, factor=0.5)
        halves = [
            Part(combine=p.combine, place=p.place, pieces=p.pieces[cut], values=own[cut], factor=p.factor)
            for p, cut in ((first, slice(0, 4)), (second, slice(4, 6)))
        ]
        moved, followed = client.exchange(halves, own, NUMBER)
    np.testing.assert_allclose(moved, 0.25 * (own[:4] - start[:4]), rtol=1e-6)
    np.testing.assert_allclose(followed, (own[4:] + start[4:]) / 2, rtol=1e-5, atol=1e-6)


def test_a_long_vector_travels_in_frames_that_are_short_enough() -> None:
    cluster, number = Cluster(1), (MAX_FRAME_PIECES * 5 + 1) * PIECE
    long = vector(0, number)
    with cluster.client() as client:
        (found,) = client.exchange([part(Combine.SET_IF_ABSENT, 0, long)], long, number)
    assert np.array_equal(found, long)
    assert cluster.shards[0].calls == 6


def test_pieces_that_a_shard_has_lost_are_brought_again() -> None:
    cluster, start, own = Cluster(2), vector(0), vector(1)
    with cluster.client() as client:
        client.exchange([part(Combine.SET_IF_ABSENT, 0, start)], start, NUMBER)
        lost = cluster.shards[1].pieces.take(np.ones(4096, bool))["pieces"]
        cluster.shards[1].pieces.drop(np.ones(4096, bool))
        (answer,) = client.exchange([part(Combine.EASGD, 1, own, factor=0.25)], own, NUMBER)
    assert 0 < len(lost) < 6
    assert not answer[lost].any()  # as they are the trainer's own now
    assert np.array_equal(cluster.master()[lost], own[lost])
    kept = np.setdiff1d(np.arange(6), lost)
    np.testing.assert_allclose(answer[kept], 0.25 * (own[kept] - start[kept]), rtol=1e-6)


def test_an_outage_is_spoken_of_once_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parameter_server.client.dense_client.SILENT_SECONDS", 0.1)
    cluster = Cluster(1)
    end = time.monotonic() + 1.0
    cluster.faults = {0: itertools.takewhile(lambda fault: time.monotonic() < end, itertools.repeat("lost"))}
    with cluster.client() as client:
        client.exchange([part(Combine.SET_IF_ABSENT, 0, vector(0))], vector(0), NUMBER)
    first, last = cluster.said
    assert "which is tried again" in first
    assert "shard 0 at local:0: reset" in first
    assert "answered again after" in last
    assert 1 <= client.retries < 12  # with pauses that grow


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        (
            itertools.repeat("lost"),
            ShardUnreachableError,
            "dense part, shard 0 at local:0: expected success within 0.3 s, got .* the last one: reset",
        ),
        (
            itertools.repeat("silent"),
            ShardUnreachableError,
            "dense part, shard 0 at local:0: .* within 0.3 s, got .* the last one: expected an answer within 0.05 s",
        ),
        (iter(["INVALID_ARGUMENT"]), RefusedError, "not now"),
        (iter(["UNAUTHENTICATED"]), RefusedError, "not now"),
        (iter(["FAILED_PRECONDITION"]), LaneLostError, "not now"),
    ],
    ids=["lost", "silent", "wrong", "unknown", "lease"],
)
def test_what_does_not_pass_ends_the_exchange(faults: Iterator[str], error: type[Exception], message: str) -> None:
    cluster = Cluster(1)
    cluster.faults = {0: faults}
    with (
        cluster.client(deadline_seconds=0.3, attempt_seconds=0.05) as client,
        pytest.raises(error, match=message) as caught,
    ):
        client.exchange([part(Combine.SET_IF_ABSENT, 0, vector(0))], vector(0), NUMBER)
    assert "\n" not in str(caught.value)


def test_closing_ends_an_exchange_under_way() -> None:
    cluster = Cluster(1)
    cluster.faults = {0: itertools.repeat("lost")}
    caught: list[BaseException] = []

    def exchange(client: DenseClient) -> None:
        try:
            client.exchange([part(Combine.SET_IF_ABSENT, 0, vector(0))], vector(0), NUMBER)
        except ShardUnreachableError as error:
            caught.append(error)

    with cluster.client() as client:
        thread = threading.Thread(target=exchange, args=(client,))
        thread.start()
        while not client.retries:
            time.sleep(0.01)
    thread.join(timeout=5)
    assert len(caught) == 1

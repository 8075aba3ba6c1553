"""A trainer's chunks: batches have the stream's own clocks, and one goes back when all that it has changed is kept."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlrm.asynchronous.leased_batches import LeasedBatches
from dlrm.training.attachments import Moment
from parameter_server.client.remote_rows import PushPlace
from parameter_server.client.rows_client import LaneLease
from parameter_server.coordinator.answers import Chunk, Finished, Wait

MOMENT = cast(Moment, None)
FIRST = Chunk(index=3, lane=3, lease=7, first_clock=5, first_sample=120, num_samples=25, batch_size=10)
SECOND = Chunk(index=4, lane=0, lease=2, first_clock=9, first_sample=145, num_samples=20, batch_size=10)


class Servers:
    """A reader, a coordinator and tables, which answer as they are told."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.completed = list(answers), []
        self.entered: list[tuple[str, PushPlace]] = []
        self.gates: list[int] = []
        self.last_push: Future[None] = Future()

    def batches(self, size: int, *, start: int, stop: int) -> Iterator[Any]:
        for first in range(start, stop, size):
            yield SimpleNamespace(sparse=f"{first} to {min(first + size, stop)}")

    def next_chunk(self) -> Any:
        return self.answers.pop(0)

    def complete_chunk(self, chunk: Chunk) -> None:
        self.completed.append(chunk.index)

    def pass_gate(self, batches: int) -> None:
        self.gates.append(batches)

    def enter(self, features: str, place: PushPlace) -> None:
        self.entered.append((features, place))


def lease(servers: Servers, *, is_gated: bool = False) -> LeasedBatches:
    return LeasedBatches(cast(Any, servers), cast(Any, servers), cast(Any, servers), is_gated=is_gated)


def train(leased: LeasedBatches, servers: Servers) -> Future[None]:
    """Trains a batch, whose push is acknowledged when the caller says so."""
    leased.before_step(MOMENT)
    servers.last_push = Future()
    leased.after_step(MOMENT, 0.5)
    return servers.last_push


def test_batches_have_the_clocks_and_ends_of_their_chunks() -> None:
    servers = Servers(FIRST, SECOND, Finished())
    leased = lease(servers, is_gated=True)
    told = []
    for _ in leased.batches(lambda: False):
        told.append((*leased.place.lease, leased.place.clock, leased.ends_chunk))
        train(leased, servers)
    assert told == [(3, 7, 5, False), (3, 7, 6, False), (3, 7, 7, True), (0, 2, 9, False), (0, 2, 10, True)]
    assert [features for features, _ in servers.entered][1:4] == ["130 to 140", "140 to 145", "145 to 155"]
    assert servers.entered[3][1] == PushPlace(LaneLease(0, 2), 9)
    assert servers.gates == [0, 1, 2, 3, 4]


def test_a_chunk_goes_back_when_all_that_its_batches_have_changed_is_acknowledged() -> None:
    servers, beside = Servers(FIRST, SECOND, Finished()), [Future[None]() for _ in range(5)]
    leased = lease(servers)
    under_way = iter(beside)
    leased.wait_for(lambda: [next(under_way)])
    pushes = [train(leased, servers) for _ in leased.batches(lambda: False)]
    for done in (*pushes[:3], *pushes[4:], *beside[:2], *beside[3:]):
        done.set_result(None)
        leased.give_back(wait=False)
    assert servers.completed == []
    beside[2].set_result(None)
    leased.give_back(wait=False)
    assert servers.completed == [3]
    pushes[3].set_result(None)
    leased.give_back(wait=True)
    assert servers.completed == [3, 4]


def test_a_push_that_has_failed_gives_no_chunk_back() -> None:
    servers = Servers(FIRST, Finished())
    leased = lease(servers)
    pushes = [train(leased, servers) for _ in leased.batches(lambda: False)]
    pushes[0].set_result(None)
    pushes[1].set_exception(ConnectionError("away"))
    pushes[2].set_result(None)
    with pytest.raises(ConnectionError, match="away"):
        leased.give_back(wait=True)
    assert servers.completed == []


def test_who_waits_for_others_data_gives_its_own_back_and_may_leave() -> None:
    servers = Servers(FIRST, Wait(0.0), Wait(0.0))
    leased = lease(servers)
    asked = iter([False, True])
    batches = leased.batches(lambda: next(asked))
    for _ in range(3):
        assert next(batches) is not None
        train(leased, servers).set_result(None)
    assert servers.completed == []
    assert next(batches) is next(batches) is None
    assert servers.completed == [3]
    with pytest.raises(KeyboardInterrupt, match="while other trainers have the rest of the data"):
        next(batches)

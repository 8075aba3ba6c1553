"""What a member holds of the coordinator: the same calls within this process and over gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from parameter_server.coordinator import Coordinator
from parameter_server.coordinator_answers import (
    PROTOCOL,
    Beat,
    Chunk,
    ClientLane,
    Finished,
    Registered,
    Role,
    SnapshotTaken,
    Status,
    Wait,
)
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.partition import Routes

Answer = TypeVar("Answer")
_STEP_SECONDS = 2.0  # of one waiting call; longer waits are several


class CoordinatorClient(Protocol):
    """The coordinator, as members see it; ``Coordinator`` describes the calls.

    All raise ``RefusedError`` where the coordinator refuses, and ``ConnectionLost`` (a ``ConnectionError``) where it
    cannot be reached. Calls that wait do so for ever, or until ``deadline_seconds`` and then raise ``TimeoutError``.
    """

    def register(
        self,
        role: Role,
        name: str,
        address: str = "",
        description_json: str | None = None,
        *,
        protocol: tuple[int, int] = PROTOCOL,
    ) -> Registered:
        """Makes somebody a member."""

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """Notes that a member is alive, and what it tells of itself."""

    def leave(self, member: int, clocks: Mapping[int, int] | None = None) -> None:
        """Ends a membership."""

    def describe(self, *, deadline_seconds: float | None = None) -> str:
        """Waits for the run's description."""

    def routes(self, newer_than: int = 0, *, deadline_seconds: float | None = None) -> Routes:
        """Waits for routes newer than an epoch."""

    def next_chunk(self, member: int) -> Chunk | Wait | Finished:
        """Gives a trainer data."""

    def progress(self, member: int, lane: int, lease: int, clock: int) -> None:
        """Notes the last clock of a lane whose pushes are acknowledged."""

    def complete_chunk(self, member: int, lane: int, lease: int, index: int) -> None:
        """Notes that all pushes of a chunk are acknowledged."""

    def client_lane(self, member: int) -> ClientLane:
        """Gives a member a lane for pushes by hand."""

    def gate(self, member: int, clock: int, *, deadline_seconds: float | None = None) -> None:
        """Waits until a trainer that has done ``clock`` batches may begin the next one."""

    def snapshot(self, name: str = "") -> SnapshotTaken:
        """Has all shards write a snapshot, and waits for it; without a name, it is called by the time."""

    def drain(self, shard: int) -> None:
        """Has a shard emptied."""

    def status(self) -> Status:
        """Tells how the run goes."""

    def close(self) -> None:
        """Ends the connection."""


class TakesSnapshots(Protocol):
    """Who can ask shards for a snapshot."""

    def snapshot(self, name: str) -> SnapshotTaken:
        """See ``CoordinatorClient``."""


class LocalCoordinatorClient:
    """A coordinator within this process.

    Args:
        coordinator: Is not closed with the client.
        keeper: Who asks shards for snapshots; without one, there are none.
    """

    def __init__(self, coordinator: Coordinator, keeper: TakesSnapshots | None = None) -> None:
        self._coordinator = coordinator
        self._keeper = keeper
        self.register = coordinator.register
        self.heartbeat = coordinator.heartbeat
        self.leave = coordinator.leave
        self.progress = coordinator.progress
        self.complete_chunk = coordinator.complete_chunk
        self.client_lane = coordinator.client_lane
        self.drain = coordinator.drain
        self.status = coordinator.status

    def describe(self, *, deadline_seconds: float | None = None) -> str:
        """See ``CoordinatorClient``."""
        return wait_for(
            lambda seconds: self._coordinator.describe(wait_seconds=seconds), "the run's description", deadline_seconds
        )

    def routes(self, newer_than: int = 0, *, deadline_seconds: float | None = None) -> Routes:
        """See ``CoordinatorClient``."""
        return wait_for(
            lambda seconds: self._coordinator.routes(newer_than, wait_seconds=seconds),
            f"routes newer than epoch {newer_than}",
            deadline_seconds,
        )

    def next_chunk(self, member: int) -> Chunk | Wait | Finished:
        """See ``CoordinatorClient``."""
        return self._coordinator.next_chunk(member)

    def gate(self, member: int, clock: int, *, deadline_seconds: float | None = None) -> None:
        """See ``CoordinatorClient``."""
        wait_for(
            lambda seconds: self._coordinator.gate(member, clock, wait_seconds=seconds) or None,
            f"slower trainers to reach batch {clock}",
            deadline_seconds,
        )

    def snapshot(self, name: str = "") -> SnapshotTaken:
        """See ``CoordinatorClient``."""
        if self._keeper is None:
            raise RefusedError(Refusal.FAILED_PRECONDITION, "snapshot: expected shards that can be asked, got none")
        return self._keeper.snapshot(name)

    def close(self) -> None:
        """See ``CoordinatorClient``."""


class CoordinatorRoutes:
    """The routes as one process knows them: kept here, so that a coordinator that is away disturbs nobody.

    Args:
        client: Of the coordinator.
        routes: To begin with; None asks for them.
    """

    def __init__(self, client: CoordinatorClient, routes: Routes | None = None) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._routes = client.routes() if routes is None else routes

    def current(self) -> Routes:
        """Gives the newest known ones, without asking."""
        with self._lock:
            return self._routes

    def newer_than(self, epoch: int) -> Routes:
        """Waits for routes of a later epoch, for as long as it takes, also while the coordinator is away."""
        with self._asking:
            while (known := self.current()).epoch <= epoch:
                try:
                    self.take(self._client.routes(max(epoch, known.epoch)))
                except ConnectionLost:
                    time.sleep(0.1)
            return known

    def take(self, routes: Routes) -> None:
        """Takes routes that came some other way; older ones are left."""
        with self._lock:
            if routes.epoch > self._routes.epoch:
                self._routes = routes


def wait_for(ask: Callable[[float], Answer | None], what: str, deadline_seconds: float | None) -> Answer:
    """Asks in steps until there is an answer.

    Args:
        ask: Waits for so many seconds at most; None: not yet.
        what: That is waited for.
        deadline_seconds: None: for ever.

    Raises:
        TimeoutError: There was none in time.
    """
    end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
    while True:
        step = _STEP_SECONDS if end is None else max(0.0, min(_STEP_SECONDS, end - time.monotonic()))
        if (answer := ask(step)) is not None:
            return answer
        if end is not None and time.monotonic() >= end:
            raise TimeoutError(f"coordinator: expected {what} within {deadline_seconds:g} s, got none")

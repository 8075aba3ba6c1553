"""What a member holds of the coordinator: the same calls within this process and over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from parameter_server.control.coordinator_connection import GrpcCoordinatorClient
from parameter_server.control.coordinator_waiting import RoutesFollower, wait_for
from parameter_server.coordinator.answers import (
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
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes

__all__ = ["CoordinatorClient", "GrpcCoordinatorClient", "LocalCoordinatorClient", "TakesSnapshots"]


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
        former: int = 0,
        protocol: tuple[int, int] = PROTOCOL,
    ) -> Registered:
        """Makes somebody a member."""

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """Notes that a member is alive, and what it tells of itself."""

    def follow_routes(self, take: Callable[[Routes], None]) -> None:
        """Has newer routes told to somebody from now on, when the answer to a heartbeat speaks of some."""

    def leave(self, member: int, clocks: Mapping[int, int] | None = None) -> None:
        """Ends a membership."""

    def describe(self, *, deadline_seconds: float | None = None) -> str:
        """Waits for the run's description."""

    def routes(self, newer_than: int = 0, *, deadline_seconds: float | None = None) -> Routes:
        """Waits for routes newer than an epoch."""

    def next_chunk(self, member: int) -> Chunk | Wait | Finished:
        """Gives a trainer data."""

    def complete_chunk(self, member: int, lane: int, lease: int, index: int) -> None:
        """Notes that all pushes of a chunk are acknowledged."""

    def client_lane(self, member: int) -> ClientLane:
        """Gives a member a lane for pushes by hand."""

    def gate(self, member: int, clock: int, *, deadline_seconds: float | None = None) -> None:
        """Waits until a trainer that has done ``clock`` batches may begin the next one."""

    def snapshot(self, name: str = "") -> SnapshotTaken:
        """Has all shards write a snapshot, and waits for it; without a name, it is called by the time."""

    def restore(self, name: str) -> None:
        """Goes back to the position of a snapshot."""

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
        self._follower = RoutesFollower()
        self.follow_routes = self._follower.follow_routes
        self.leave = coordinator.leave
        self.complete_chunk = coordinator.complete_chunk
        self.client_lane = coordinator.client_lane
        self.drain = coordinator.drain
        self.restore = coordinator.restore
        self.status = coordinator.status

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """See ``CoordinatorClient``."""
        return self._follower.beat(
            facts,
            lambda told: self._coordinator.heartbeat(member, told),
            lambda epoch: self.routes(epoch, deadline_seconds=0.0),
        )

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

"""What a member holds of the coordinator: the same calls within this process and over gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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

if TYPE_CHECKING:
    from parameter_server.security import ClientSecurity

Answer = TypeVar("Answer")
_STEP_SECONDS = 2.0  # of one waiting call; longer waits are several
_CALL_SECONDS = 10.0  # beyond what a call waits by itself; none takes longer on a coordinator that is alive
_AGAIN_SECONDS = 0.2
SNAPSHOT_SECONDS = 3600.0
_FULL_SECONDS = 0.05  # after which a coordinator that has no room for waiting calls is asked again


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
        self.heartbeat = coordinator.heartbeat
        self.leave = coordinator.leave
        self.progress = coordinator.progress
        self.complete_chunk = coordinator.complete_chunk
        self.client_lane = coordinator.client_lane
        self.drain = coordinator.drain
        self.restore = coordinator.restore
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


class GrpcCoordinatorClient:
    """A coordinator behind gRPC.

    Calls are tried again while it cannot be reached: it comes back with all that it had answered. A chunk whose answer
    is lost is asked for once more; heartbeats and ``leave`` are tried once.

    Args:
        address: ``host:port`` or ``unix:/path``.
        security: What is shown to the server; by default nothing, and only to servers of this machine.
        deadline_seconds: For which a call is tried.

    Raises:
        ValueError: Plain text would leave the machine, or gRPC is not installed.
    """

    def __init__(self, address: str, security: ClientSecurity | None = None, *, deadline_seconds: float = 60.0) -> None:
        from parameter_server.security import ClientSecurity, import_grpc
        from parameter_server.transports import CHANNEL_OPTIONS

        import_grpc()
        from parameter_server import control_messages, control_pb2, control_pb2_grpc

        self.address = address
        self._deadline_seconds = deadline_seconds
        self._security = security or ClientSecurity()
        self._channel = self._security.open_channel(address, CHANNEL_OPTIONS)
        self._stub: Any = control_pb2_grpc.CoordinatorStub(self._channel)
        self._pb, self._messages = control_pb2, control_messages
        self._held: dict[int, set[int]] = {}

    def register(
        self,
        role: Role,
        name: str,
        address: str = "",
        description_json: str | None = None,
        *,
        protocol: tuple[int, int] = PROTOCOL,
    ) -> Registered:
        """See ``CoordinatorClient``."""
        request = self._pb.RegisterRequest(
            major=protocol[0],
            minor=protocol[1],
            role=role,
            name=name,
            address=address,
            description=description_json,
        )
        return self._messages.read_registered(self._call(self._stub.Register, request))

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """See ``CoordinatorClient``."""
        request = self._pb.HeartbeatRequest(member=member, facts=facts)
        return self._messages.read_beat(self._try(self._stub.Heartbeat, request))

    def leave(self, member: int, clocks: Mapping[int, int] | None = None) -> None:
        """See ``CoordinatorClient``."""
        self._held.pop(member, None)
        self._try(self._stub.Leave, self._pb.LeaveRequest(member=member, clocks=clocks))

    def describe(self, *, deadline_seconds: float | None = None) -> str:
        """See ``CoordinatorClient``."""

        def ask(seconds: float) -> str | None:
            reply = self._call(self._stub.Describe, self._pb.WaitRequest(wait_seconds=seconds))
            return reply.json if reply.HasField("json") else None

        return wait_for(ask, "the run's description", deadline_seconds)

    def routes(self, newer_than: int = 0, *, deadline_seconds: float | None = None) -> Routes:
        """See ``CoordinatorClient``."""

        def ask(seconds: float) -> Routes | None:
            request = self._pb.RoutesRequest(newer_than=newer_than, wait_seconds=seconds)
            found: Routes | None = self._messages.read_routes(
                self._call(self._stub.GetRoutes, request, deadline_seconds)
            )
            return found

        return wait_for(ask, f"routes newer than epoch {newer_than}", deadline_seconds)

    def next_chunk(self, member: int) -> Chunk | Wait | Finished:
        """See ``CoordinatorClient``."""
        held = self._held.setdefault(member, set())
        request = self._pb.NextChunkRequest(member=member, holding=self._pb.Indices(indices=sorted(held)))
        answer = self._messages.read_chunk(self._call(self._stub.NextChunk, request))
        if isinstance(answer, Chunk):
            held.add(answer.index)
        return answer

    def progress(self, member: int, lane: int, lease: int, clock: int) -> None:
        """See ``CoordinatorClient``."""
        request = self._pb.ProgressRequest(member=member, lane=lane, lease=lease, clock=clock)
        self._call(self._stub.Progress, request)

    def complete_chunk(self, member: int, lane: int, lease: int, index: int) -> None:
        """See ``CoordinatorClient``."""
        request = self._pb.CompleteChunkRequest(member=member, lane=lane, lease=lease, index=index)
        self._call(self._stub.CompleteChunk, request)
        self._held.get(member, set()).discard(index)

    def client_lane(self, member: int) -> ClientLane:
        """See ``CoordinatorClient``."""
        reply = self._call(self._stub.TakeClientLane, self._pb.MemberRequest(member=member))
        return self._messages.read_client_lane(reply)

    def gate(self, member: int, clock: int, *, deadline_seconds: float | None = None) -> None:
        """See ``CoordinatorClient``."""

        def ask(seconds: float) -> bool | None:
            request = self._pb.GateRequest(member=member, clock=clock, wait_seconds=seconds)
            return self._call(self._stub.Gate, request).open or None

        wait_for(ask, f"slower trainers to reach batch {clock}", deadline_seconds)

    def snapshot(self, name: str = "") -> SnapshotTaken:
        """See ``CoordinatorClient``."""
        request = self._pb.SnapshotRequest(name=name)
        reply = self._try(self._stub.Snapshot, request, SNAPSHOT_SECONDS)
        return SnapshotTaken(reply.name, reply.time, reply.completed_chunks)

    def restore(self, name: str) -> None:
        """See ``CoordinatorClient``."""
        self._call(self._stub.Restore, self._pb.SnapshotRequest(name=name))

    def drain(self, shard: int) -> None:
        """See ``CoordinatorClient``."""
        self._call(self._stub.Drain, self._pb.DrainRequest(shard=shard))

    def status(self) -> Status:
        """See ``CoordinatorClient``."""
        return self._messages.read_status(self._call(self._stub.GetStatus, self._pb.StatusRequest()))

    def close(self) -> None:
        """See ``CoordinatorClient``."""
        self._channel.close()

    def _try(self, method: Any, request: Any, seconds: float = _CALL_SECONDS) -> Any:
        from parameter_server.control_calls import call

        return call(method, request, seconds, f"coordinator at {self.address}")

    def _call(self, method: Any, request: Any, deadline_seconds: float | None = None) -> Any:
        seconds = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        end = time.monotonic() + min(seconds, self._deadline_seconds)
        while True:
            try:
                return self._try(method, request)
            except (ConnectionLost, RefusedError) as error:
                if isinstance(error, RefusedError) and error.refusal is not Refusal.UNAVAILABLE:
                    raise
                if time.monotonic() >= end:
                    from parameter_server.unreachable import why_unreachable

                    raise ConnectionLost(
                        f"coordinator: {why_unreachable(self.address, self._security)}; tried for {seconds:g} s"
                    ) from error
                time.sleep(_AGAIN_SECONDS)


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
        began = time.monotonic()
        if (answer := ask(step)) is not None:
            return answer
        if end is not None and time.monotonic() >= end:
            raise TimeoutError(f"coordinator: expected {what} within {deadline_seconds:g} s, got none")
        if time.monotonic() - began < step / 2:
            time.sleep(_FULL_SECONDS)

"""The coordinator over gRPC, for members and people."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from parameter_server.client.retries import Patience
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
from parameter_server.errors import ConnectionLost, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Routes

if TYPE_CHECKING:
    from parameter_server.security.security import ClientSecurity

_CALL_SECONDS = 10.0  # beyond what a call waits by itself; none takes longer on a coordinator that is alive
SNAPSHOT_SECONDS = 3600.0


class GrpcCoordinatorClient:
    """A coordinator behind gRPC.

    Calls are tried again while it cannot be reached: it comes back with all that it had answered. A chunk whose answer
    is lost is asked for once more; heartbeats, ``leave`` and ``snapshot`` are tried once. Calls that wait
    until a deadline of their own are tried no longer than that either, and raise ``ConnectionLost`` where nobody has
    answered by then.

    Args:
        address: ``host:port`` or ``unix:/path``.
        security: What is shown to the server; by default nothing, and only to servers of this machine.
        deadline_seconds: For which a call is tried.

    Raises:
        ValueError: Plain text would leave the machine, or gRPC is not installed.
    """

    def __init__(self, address: str, security: ClientSecurity | None = None, *, deadline_seconds: float = 60.0) -> None:
        from parameter_server.security.security import ClientSecurity, import_grpc
        from parameter_server.transports import CHANNEL_OPTIONS

        import_grpc()
        from parameter_server.control import control_pb2, control_pb2_grpc, messages

        self.address = address
        self._deadline_seconds = deadline_seconds
        self._security = security or ClientSecurity()
        self._channel = self._security.open_channel(address, CHANNEL_OPTIONS)
        self._stub: Any = control_pb2_grpc.CoordinatorStub(self._channel)
        self._pb, self._messages = control_pb2, messages
        self._held: dict[int, set[int]] = {}
        self._follower = RoutesFollower()

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
        """See ``CoordinatorClient``."""
        request = self._pb.RegisterRequest(
            major=protocol[0],
            minor=protocol[1],
            role=role,
            name=name,
            address=address,
            description=description_json,
            former=former,
        )
        return self._messages.read_registered(self._call(self._stub.Register, request))

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """See ``CoordinatorClient``."""

        def send(told: Mapping[str, float]) -> Beat:
            request = self._pb.HeartbeatRequest(member=member, facts=told)
            beat: Beat = self._messages.read_beat(self._try(self._stub.Heartbeat, request))
            return beat

        return self._follower.beat(facts, send, lambda epoch: self.routes(epoch, deadline_seconds=0.0))

    def follow_routes(self, take: Callable[[Routes], None]) -> None:
        """See ``CoordinatorClient``."""
        self._follower.follow_routes(take)

    def leave(self, member: int, clocks: Mapping[int, int] | None = None) -> None:
        """See ``CoordinatorClient``."""
        self._held.pop(member, None)
        self._try(self._stub.Leave, self._pb.LeaveRequest(member=member, clocks=clocks))

    def describe(self, *, deadline_seconds: float | None = None) -> str:
        """See ``CoordinatorClient``."""
        until = _after(deadline_seconds)

        def ask(seconds: float) -> str | None:
            reply = self._call(self._stub.Describe, self._pb.WaitRequest(wait_seconds=seconds), until)
            return reply.json if reply.HasField("json") else None

        return wait_for(ask, "the run's description", deadline_seconds)

    def routes(self, newer_than: int = 0, *, deadline_seconds: float | None = None) -> Routes:
        """See ``CoordinatorClient``."""
        until = _after(deadline_seconds)

        def ask(seconds: float) -> Routes | None:
            request = self._pb.RoutesRequest(newer_than=newer_than, wait_seconds=seconds)
            found: Routes | None = self._messages.read_routes(self._call(self._stub.GetRoutes, request, until))
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
        until = _after(deadline_seconds)

        def ask(seconds: float) -> bool | None:
            request = self._pb.GateRequest(member=member, clock=clock, wait_seconds=seconds)
            return self._call(self._stub.Gate, request, until).open or None

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
        from parameter_server.control.calls import call

        return call(method, request, seconds, f"coordinator at {self.address}")

    def _call(self, method: Any, request: Any, until: float | None = None) -> Any:
        seconds = self._deadline_seconds
        if until is not None:
            seconds = max(0.0, min(seconds, until - time.monotonic()))
        patience = Patience(seconds)
        while True:
            try:
                return self._try(method, request)
            except (ConnectionLost, RefusedError) as error:
                if isinstance(error, RefusedError) and error.refusal is not Refusal.UNAVAILABLE:
                    raise
                try:
                    delay = patience.fail("coordinator", error)
                except ShardUnreachableError:
                    from parameter_server.security.unreachable import why_unreachable

                    reason = why_unreachable(self.address, self._security)
                    raise ConnectionLost(f"coordinator: {reason}; tried for {round(seconds, 1):g} s") from error
                time.sleep(delay)


def _after(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds

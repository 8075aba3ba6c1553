"""The coordinator as a gRPC service: checks sizes, bounds how many calls wait, and leaves the rest to `Coordinator`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from parameter_server import limits
from parameter_server.control import control_pb2 as pb
from parameter_server.control import messages as messages
from parameter_server.control.calls import answer, done
from parameter_server.control.control_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from parameter_server.control.coordinator_client import LocalCoordinatorClient, TakesSnapshots
from parameter_server.coordinator.answers import PROTOCOL
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.errors import wrong

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

SERVICE = "recforge.v1.Coordinator"
MAX_WAIT_SECONDS = 5.0
_Reply = TypeVar("_Reply")


class CoordinatorService(CoordinatorServicer):
    """Answers members' calls.

    Args:
        coordinator: Is not closed with the service.
        keeper: Who asks shards for snapshots; None: snapshots are refused.
        max_waiting: Calls that may wait at a time, each of which takes a thread; others are answered "not yet" at once.
    """

    def __init__(self, coordinator: Coordinator, keeper: TakesSnapshots | None = None, *, max_waiting: int = 8) -> None:
        self._coordinator = coordinator
        self._snapshots = LocalCoordinatorClient(coordinator, keeper)
        self._places = threading.Semaphore(max_waiting)

    def add_to(self, server: grpc.Server) -> None:
        """Has a server answer for the coordinator."""
        add_CoordinatorServicer_to_server(self, server)

    def Register(self, request: pb.RegisterRequest, context: grpc.ServicerContext) -> pb.RegisterReply:
        """See ``Coordinator.register``."""
        role: Any = request.role  # checked by it

        def work() -> pb.RegisterReply:
            registered = self._coordinator.register(
                role,
                request.name,
                request.address,
                request.description if request.HasField("description") else None,
                former=request.former,
                protocol=(request.major, request.minor),
            )
            return messages.write_registered(registered, PROTOCOL)

        return answer(work, context)

    def Heartbeat(self, request: pb.HeartbeatRequest, context: grpc.ServicerContext) -> pb.HeartbeatReply:
        """See ``Coordinator.heartbeat``."""
        return answer(
            lambda: pb.HeartbeatReply(**self._coordinator.heartbeat(request.member, request.facts)._asdict()), context
        )

    def Leave(self, request: pb.LeaveRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``Coordinator.leave``."""
        return done(lambda: self._coordinator.leave(request.member, dict(request.clocks)), context)

    def Describe(self, request: pb.WaitRequest, context: grpc.ServicerContext) -> pb.Description:
        """See ``Coordinator.describe``."""
        return self._wait(
            request.wait_seconds,
            lambda seconds: pb.Description(json=self._coordinator.describe(wait_seconds=seconds)),
            context,
        )

    def GetRoutes(self, request: pb.RoutesRequest, context: grpc.ServicerContext) -> pb.Routes:
        """See ``Coordinator.routes``."""
        return self._wait(
            request.wait_seconds,
            lambda seconds: messages.write_routes(self._coordinator.routes(request.newer_than, wait_seconds=seconds)),
            context,
        )

    def NextChunk(self, request: pb.NextChunkRequest, context: grpc.ServicerContext) -> pb.NextChunkReply:
        """See ``Coordinator.next_chunk``."""

        def work() -> pb.NextChunkReply:
            if len(request.holding.indices) > limits.MAX_HOLDING:
                raise wrong(f"holding: expected at most {limits.MAX_HOLDING} chunks, got more")
            holding = list(request.holding.indices) if request.HasField("holding") else None
            return messages.write_chunk(self._coordinator.next_chunk(request.member, holding))

        return answer(work, context)

    def CompleteChunk(self, request: pb.CompleteChunkRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``Coordinator.complete_chunk``."""
        return done(
            lambda: self._coordinator.complete_chunk(request.member, request.lane, request.lease, request.index),
            context,
        )

    def TakeClientLane(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.ClientLane:
        """See ``Coordinator.client_lane``."""
        return answer(lambda: pb.ClientLane(**self._coordinator.client_lane(request.member)._asdict()), context)

    def Gate(self, request: pb.GateRequest, context: grpc.ServicerContext) -> pb.GateReply:
        """See ``Coordinator.gate``."""
        return self._wait(
            request.wait_seconds,
            lambda seconds: pb.GateReply(
                open=self._coordinator.gate(request.member, request.clock, wait_seconds=seconds)
            ),
            context,
        )

    def Snapshot(self, request: pb.SnapshotRequest, context: grpc.ServicerContext) -> pb.SnapshotReply:
        """Has all shards write a snapshot, and answers when they have."""
        return answer(lambda: pb.SnapshotReply(**self._snapshots.snapshot(request.name)._asdict()), context)

    def Restore(self, request: pb.SnapshotRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``Coordinator.restore``."""
        return done(lambda: self._coordinator.restore(request.name), context)

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``Coordinator.drain``."""
        return done(lambda: self._coordinator.drain(request.shard), context)

    def GetStatus(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.Status:
        """See ``Coordinator.status``."""
        return answer(lambda: messages.write_status(self._coordinator.status()), context)

    def _wait(self, seconds: float, work: Callable[[float], _Reply], context: grpc.ServicerContext) -> _Reply:
        def bounded() -> _Reply:
            if not 0 <= seconds <= 3600:
                raise wrong(f"wait_seconds: expected 0 to 3600, got {seconds}")
            with self._place() as has_place:
                return work(min(seconds, MAX_WAIT_SECONDS) if has_place else 0.0)

        return answer(bounded, context)

    @contextmanager
    def _place(self) -> Iterator[bool]:
        taken = self._places.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._places.release()

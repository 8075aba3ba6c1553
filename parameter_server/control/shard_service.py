"""A shard's control over gRPC: the service beside its pulls and pushes, and its client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from parameter_server import limits
from parameter_server.address import Address
from parameter_server.control import control_pb2 as pb
from parameter_server.control import messages as messages
from parameter_server.control.calls import answer, call, done, stream
from parameter_server.control.control_pb2_grpc import (
    ShardControlServicer,
    ShardControlStub,
    add_ShardControlServicer_to_server,
)
from parameter_server.errors import ConnectionLost, wrong
from parameter_server.grpc_status import abort
from parameter_server.partition import Routes
from parameter_server.security.security import ClientSecurity
from parameter_server.shard.control import Copied, Mask, MovableShard, ShardControl, Taken
from parameter_server.transports import CHANNEL_OPTIONS

if TYPE_CHECKING:
    import grpc

SHARD_SERVICE = "recforge.v1.ShardControl"
_ORDER_SECONDS = 10.0
_SETTLE_SECONDS = 120.0  # rows are dropped meanwhile
_LONG_SECONDS = 3600.0  # of copies and snapshots; a peer that dies ends them at once


class ShardControlService(ShardControlServicer):
    """Answers the coordinator and other shards.

    Args:
        shard: Is not closed with the service.
        security: Of calls to other shards.
    """

    def __init__(self, shard: MovableShard, security: ClientSecurity | None = None) -> None:
        self.control = ShardControl(shard, lambda address: GrpcShardLink(address, security))

    def add_to(self, server: grpc.Server) -> None:
        """Has a server answer for the shard."""
        add_ShardControlServicer_to_server(self, server)

    def close(self) -> None:
        """Lets go of the shard."""
        self.control.stop()

    def SetRoutes(self, request: pb.Routes, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.set_routes``."""
        return done(lambda: self.control.set_routes(_routes(request)), context)

    def Settle(self, request: pb.SettleRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.settle``."""
        return done(lambda: self.control.settle(request.order, _routes(request.routes)), context)

    def Freeze(self, request: pb.FreezeRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.freeze``."""
        return done(
            lambda: self.control.freeze(request.order, messages.read_buckets(request.buckets), request.seconds), context
        )

    def KeepFrozen(self, request: pb.FreezeName, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.keep_frozen``."""
        return done(lambda: self.control.keep_frozen(request.order), context)

    def Thaw(self, request: pb.FreezeName, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.thaw``."""
        return done(lambda: self.control.thaw(request.order), context)

    def CopyBuckets(self, request: pb.CopyBucketsRequest, context: grpc.ServicerContext) -> pb.CopyBucketsReply:
        """See ``ShardControl.copy``."""

        def work() -> pb.CopyBucketsReply:
            buckets, since = messages.read_buckets(request.buckets), _versions(request.since)
            limits.check_text("address", request.address, limits.MAX_ADDRESS)
            try:
                Address.parse(request.address)
            except ValueError as error:
                raise wrong(str(error)) from error
            copied = self.control.copy(request.order, request.address, buckets, since, is_last=request.is_last)
            return pb.CopyBucketsReply(versions=copied.versions, bytes=copied.bytes)

        return answer(work, context)

    def TakeBuckets(self, request: pb.TakeBucketsRequest, context: grpc.ServicerContext) -> Iterator[pb.Piece]:
        """See ``ShardControl.take``."""
        try:
            taken = self.control.take(messages.read_buckets(request.buckets), _versions(request.since))
            yield pb.Piece(versions=messages.write_versions(taken.versions))
            for chunk in taken.chunks:
                yield pb.Piece(chunk=chunk)
        except Exception as error:
            abort(error, context)

    def WriteSnapshot(self, request: pb.SnapshotRequest, context: grpc.ServicerContext) -> pb.Done:
        """See ``ShardControl.snapshot``."""
        return done(self.control.snapshot, context)


class GrpcShardLink:
    """A shard behind gRPC; see ``ShardLink``.

    Args:
        address: Of the shard.
        security: What is shown to it.
    """

    def __init__(self, address: str, security: ClientSecurity | None = None) -> None:
        self._whom = f"shard at {address}"
        self._channel = (security or ClientSecurity()).open_channel(address, CHANNEL_OPTIONS)
        self._stub: Any = ShardControlStub(self._channel)

    def set_routes(self, routes: Routes) -> None:
        """See ``ShardLink``."""
        self._call(self._stub.SetRoutes, messages.write_routes(routes))

    def settle(self, order: int, routes: Routes) -> None:
        """See ``ShardLink``."""
        self._call(
            self._stub.Settle, pb.SettleRequest(order=order, routes=messages.write_routes(routes)), _SETTLE_SECONDS
        )

    def freeze(self, order: int, buckets: Mask, seconds: float) -> None:
        """See ``ShardLink``."""
        request = pb.FreezeRequest(order=order, buckets=messages.write_buckets(buckets), seconds=seconds)
        self._call(self._stub.Freeze, request)

    def keep_frozen(self, order: int) -> None:
        """See ``ShardLink``."""
        self._call(self._stub.KeepFrozen, pb.FreezeName(order=order))

    def thaw(self, order: int) -> None:
        """See ``ShardLink``."""
        self._call(self._stub.Thaw, pb.FreezeName(order=order))

    def copy(self, order: int, address: str, buckets: Mask, since: Sequence[int], *, is_last: bool) -> Copied:
        """See ``ShardLink``."""
        packed = messages.write_buckets(buckets)
        request = pb.CopyBucketsRequest(order=order, address=address, buckets=packed, since=since, is_last=is_last)
        reply = self._call(self._stub.CopyBuckets, request, _LONG_SECONDS)
        return Copied(list(reply.versions), reply.bytes)

    def take(self, buckets: Mask, since: Sequence[int]) -> Taken:
        """See ``ShardLink``."""
        request = pb.TakeBucketsRequest(buckets=messages.write_buckets(buckets), since=since)
        pieces: Iterator[pb.Piece] = stream(self._stub.TakeBuckets, request, _LONG_SECONDS, self._whom)
        first = next(pieces, None)
        if first is None or not first.HasField("versions"):
            raise ConnectionLost(f"{self._whom}: expected versions before what is in buckets, got something else")
        return Taken(list(first.versions.indices), (piece.chunk for piece in pieces))

    def snapshot(self) -> None:
        """See ``ShardLink``."""
        self._call(self._stub.WriteSnapshot, pb.SnapshotRequest(), _LONG_SECONDS)

    def close(self) -> None:
        """See ``ShardLink``."""
        self._channel.close()

    def _call(self, method: Any, request: Any, seconds: float = _ORDER_SECONDS) -> Any:
        return call(method, request, seconds, self._whom)


def _routes(message: pb.Routes) -> Routes:
    if (routes := messages.read_routes(message)) is None:
        raise wrong("routes: expected some, got none")
    return routes


def _versions(since: Sequence[int]) -> list[int]:
    if len(since) > limits.MAX_TABLES or any(version < 0 for version in since):
        raise wrong(f"since: expected at most {limits.MAX_TABLES} versions >= 0, got others")
    return list(since)

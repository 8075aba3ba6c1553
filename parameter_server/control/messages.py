"""The control plane's protobuf messages, as what the rest of the code has instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server import limits
from parameter_server.control import control_pb2 as pb
from parameter_server.coordinator.answers import (
    Beat,
    Chunk,
    ClientLane,
    Finished,
    MemberStatus,
    Registered,
    Status,
    Wait,
)
from parameter_server.errors import wrong
from parameter_server.partition import Routes

_OWNERS = np.dtype("<i4")


def write_routes(routes: Routes | None) -> pb.Routes:
    """Writes routes; none as a message without owners."""
    if routes is None:
        return pb.Routes()
    owners = routes.owners.astype(_OWNERS).tobytes()
    return pb.Routes(epoch=routes.epoch, owners=owners, addresses=dict(routes.addresses))


def read_routes(message: pb.Routes) -> Routes | None:
    """Reads routes.

    Raises:
        RefusedError: With INVALID_ARGUMENT: these are none.
    """
    if not message.owners:
        return None
    if len(message.owners) != NUM_BUCKETS * _OWNERS.itemsize:
        raise wrong(f"routes: expected owners of {NUM_BUCKETS} buckets, got {len(message.owners)} bytes")
    if not 1 <= message.epoch <= limits.MAX_EPOCH:
        raise wrong(f"routes: expected an epoch from 1 to {limits.MAX_EPOCH}, got {message.epoch}")
    if len(message.addresses) > limits.MAX_SHARDS:
        raise wrong(f"routes: expected at most {limits.MAX_SHARDS} shards, got {len(message.addresses)}")
    for address in message.addresses.values():
        limits.check_text("address", address, limits.MAX_ADDRESS)
    try:
        owners = np.frombuffer(message.owners, _OWNERS).astype(np.int32)
        return Routes(epoch=message.epoch, owners=owners, addresses=dict(message.addresses))
    except ValueError as error:
        raise wrong(str(error)) from error


def write_buckets(buckets: NDArray[np.bool_]) -> bytes:
    """Writes a mask of buckets [4096] as bits."""
    return np.packbits(buckets).tobytes()


def read_buckets(packed: bytes) -> NDArray[np.bool_]:
    """Reads a mask of buckets [4096].

    Raises:
        RefusedError: With INVALID_ARGUMENT: it is of another length.
    """
    if len(packed) != NUM_BUCKETS // 8:
        raise wrong(f"buckets: expected {NUM_BUCKETS // 8} bytes, got {len(packed)}")
    return np.unpackbits(np.frombuffer(packed, np.uint8)).astype(np.bool_)


def write_registered(registered: Registered, protocol: tuple[int, int]) -> pb.RegisterReply:
    """Writes the answer to a registration."""
    return pb.RegisterReply(
        major=protocol[0],
        minor=protocol[1],
        member=registered.member,
        lease_seconds=registered.lease_seconds,
        description=registered.description_json,
        routes=None if registered.routes is None else write_routes(registered.routes),
        shard=registered.shard,
    )


def read_registered(reply: pb.RegisterReply) -> Registered:
    """Reads the answer to a registration."""
    return Registered(
        member=reply.member,
        lease_seconds=reply.lease_seconds,
        description_json=reply.description if reply.HasField("description") else None,
        routes=read_routes(reply.routes),
        shard=reply.shard if reply.HasField("shard") else None,
    )


def read_beat(reply: pb.HeartbeatReply) -> Beat:
    """Reads the answer to a heartbeat."""
    return Beat(**_fields(reply))


def write_chunk(answer: Chunk | Wait | Finished) -> pb.NextChunkReply:
    """Writes what a trainer is given."""
    if isinstance(answer, Wait):
        return pb.NextChunkReply(wait_seconds=answer.seconds)
    if isinstance(answer, Finished):
        return pb.NextChunkReply(finished=pb.Done())
    return pb.NextChunkReply(chunk=pb.Chunk(**vars(answer)))


def read_chunk(reply: pb.NextChunkReply) -> Chunk | Wait | Finished:
    """Reads what a trainer is given."""
    kind = reply.WhichOneof("answer")
    if kind == "wait_seconds":
        return Wait(reply.wait_seconds)
    if kind == "finished":
        return Finished()
    return Chunk(**_fields(reply.chunk))


def read_client_lane(reply: pb.ClientLane) -> ClientLane:
    """Reads a lane for pushes by hand."""
    return ClientLane(**_fields(reply))


def write_status(status: Status) -> pb.Status:
    """Writes how a run goes."""
    members = [pb.Member(**vars(member)) for member in status.members]
    return pb.Status(**{**vars(status), "members": members})


def read_status(reply: pb.Status) -> Status:
    """Reads how a run goes."""
    members = tuple(MemberStatus(**{**_fields(it), "facts": dict(it.facts)}) for it in reply.members)
    lists = {"members": members, "snapshots": tuple(reply.snapshots), "notes": tuple(reply.notes)}
    return Status(**{**_fields(reply), **lists})


def write_versions(versions: Sequence[int]) -> pb.Indices:
    """Writes the versions of tables."""
    return pb.Indices(indices=versions)


def _fields(message: Any) -> dict[str, Any]:
    """Gives a message's fields by name; None is an optional one that is missing."""
    return {
        field.name: None if field.has_presence and not message.HasField(field.name) else getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
    }

"""The frames of the data plane: a header of fixed size, ids and values; nothing of one is used before all is checked.

A message is one frame or several, one after the other. A frame, little-endian, is a header of 96 bytes, then ``n``
int64 ids, ``[n, dim]`` values and ``n`` uint32 counts where the flags say so, each padded with zeros to 16 bytes. The
header's last field is the XXH3 (64 bits; Collet) of all that comes before it and after it, so that a frame is as it was
sent or is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from parameter_server.errors import Refusal, RefusedError

MAGIC = 0x46524350  # "PCRF"
VERSION = 1
HEADER_BYTES = 96
MAX_FRAME_BYTES = 4 << 20  # a sender cuts larger ones
MAX_MESSAGE_BYTES = (8 << 20) + HEADER_BYTES
MAX_REPLY_BYTES = MAX_MESSAGE_BYTES + (1 << 20)  # headers of many frames add up
MAX_MESSAGE_FRAMES = 4096  # each costs some microseconds, however little it holds

_LAYOUT = struct.Struct("<IHBBQIIQIIIHBBQQdd8xQ")  # factors in full: a rate is rounded once, where it is used
_CHECKSUM_AT = _LAYOUT.size - 8
_ALIGNMENT = 16
assert _LAYOUT.size == HEADER_BYTES

Longs = NDArray[np.int64]
Values = NDArray[Any]  # float32 or float16
Counts = NDArray[np.uint32]


class Op(IntEnum):
    """What a frame asks for, or answers."""

    PULL = 1  # ids -> values of the asked-for type
    PUSH = 2  # ids and gradients
    DENSE = 3  # pieces of the dense part: exchanged with, or added to, the master copy
    RECORDS = 4  # whole rows: with their states, read and stored; or as readers are told of them
    EVICTED = 5  # ids of rows that are no more


class Flag(IntFlag):
    """What a frame holds."""

    NONE = 0
    REPLY = 1
    IDS = 2
    VALUES = 4
    DUPLICATE = 8  # of a reply: it had been applied before, and was not again
    COUNTS = 16  # of a push: how often each id occurred in the batch


class Type(IntEnum):
    """Of values; in a request without any, of those wanted."""

    FP32 = 1
    FP16 = 2


DTYPES: dict[Type, np.dtype[Any]] = {Type.FP32: np.dtype("<f4"), Type.FP16: np.dtype("<f2")}
_IDS, _COUNTS = np.dtype("<i8"), np.dtype("<u4")
NO_COUNTS: Counts = np.empty(0, _COUNTS)


class Header(NamedTuple):
    """The head of a frame; ``n``, ``dim``, ``type`` and ``flags`` follow from what it holds.

    Attributes:
        op: See ``Op``.
        flags: See ``Flag``.
        run_id: Of the run; one of another run is refused.
        lane: Whose push it is: pushes of a lane have an order, and each is applied once.
        lease: Of the lane; a shard refuses an earlier one.
        seq: Number of the push in (lane, lease, shard), from 1, without gaps.
        table: Number of the table in the run's description.
        route_epoch: Of the routes that the sender knows; pushes are cut by them. In a lease, a shard applies no push
            after one of a later (route_epoch, codec): it is late, and has been sent again in another form.
        n: Number of ids, or of rows of values.
        dim: Numbers per row.
        type: See ``Type``.
        codec: Of ``Op.DENSE``, how pieces are combined; of a push, how often its lane's frames to this shard have been
            numbered anew.
        clock: Number of the lane's batch, from 1. What has been applied is known by it for ever.
        version: Of a pull's reply, how many pushes the table's rows on this shard had seen; of a push, that of the
            pull that its gradients were computed from.
        factor: Multiplies the learning rate.
        eps_factor: Multiplies ``eps``.
    """

    op: int
    flags: int = 0
    run_id: int = 0
    lane: int = 0
    lease: int = 0
    seq: int = 0
    table: int = 0
    route_epoch: int = 0
    n: int = 0
    dim: int = 0
    type: int = Type.FP32
    codec: int = 0
    clock: int = 0
    version: int = 0
    factor: float = 1.0
    eps_factor: float = 1.0


class Frame(NamedTuple):
    """A checked frame: views of the message, which must not be written to."""

    header: Header
    ids: Longs  # [n], or empty
    values: Values  # [n, dim], or [0, dim]
    counts: Counts = NO_COUNTS  # [n], or empty


def encode(
    header: Header, ids: Longs | None = None, values: Values | None = None, counts: Counts = NO_COUNTS
) -> list[bytes | memoryview]:
    """Lays out a frame as parts to be joined; sizes, type and flags are filled in, and the checksum.

    Args:
        header: What is not about ids and values.
        ids: [n] int64, contiguous.
        values: [n, dim] float32 or float16, contiguous.
        counts: [n] uint32, contiguous; empty: none.
    """
    flags, n, dim, kind = header.flags & ~_BODIES, header.n, header.dim, header.type
    bodies: list[memoryview] = []
    if ids is not None:
        flags, n = flags | Flag.IDS, len(ids)
        bodies.append(ids.astype(_IDS, copy=False).data.cast("B"))
    if values is not None:
        flags, (n, dim) = flags | Flag.VALUES, values.shape
        kind = Type.FP16 if values.dtype == np.float16 else Type.FP32
        bodies.append(values.reshape(-1).data.cast("B"))
    if counts.size:
        flags |= Flag.COUNTS
        bodies.append(counts.astype(_COUNTS, copy=False).data.cast("B"))
    head = header._replace(flags=flags, n=n, dim=dim, type=kind)
    packed = _pack(head)
    checksum = xxhash.xxh3_64(packed)
    parts: list[bytes | memoryview] = []
    for body in bodies:
        checksum.update(body)
        parts.append(body)
        if padding := bytes(-body.nbytes % _ALIGNMENT):
            checksum.update(padding)
            parts.append(padding)
    return [packed + checksum.intdigest().to_bytes(8, "little"), *parts]


def join(frames: Sequence[list[bytes | memoryview]]) -> bytes:
    """Joins encoded frames to one message."""
    return b"".join(part for parts in frames for part in parts)


def decode(message: bytes) -> list[Frame]:
    """Checks a message whole, and gives its frames.

    Raises:
        RefusedError: With INVALID_ARGUMENT: it is not a message of this version, too long, cut, or damaged.
    """
    if not HEADER_BYTES <= len(message) <= MAX_MESSAGE_BYTES:
        raise _wrong(f"expected {HEADER_BYTES} to {MAX_MESSAGE_BYTES} bytes, got {len(message)}")
    frames: list[Frame] = []
    at = 0
    while at < len(message):
        if len(frames) == MAX_MESSAGE_FRAMES:
            raise _wrong(f"expected at most {MAX_MESSAGE_FRAMES} frames in a message, got more")
        frame, at = _decode_frame(message, at)
        frames.append(frame)
    return frames


def frame_bytes(n: int, dim: int, kind: Type, *, has_ids: bool, has_values: bool, has_counts: bool = False) -> int:
    """Says how long a frame is."""
    ids = _padded(n * _IDS.itemsize) if has_ids else 0
    counts = _padded(n * _COUNTS.itemsize) if has_counts else 0
    return HEADER_BYTES + ids + (_padded(n * dim * DTYPES[kind].itemsize) if has_values else 0) + counts


def length_of(header: Header) -> int:
    """Says how long the frame of a header is; its type is a known one."""
    has_ids, has_values, has_counts = (bool(header.flags & flag) for flag in (Flag.IDS, Flag.VALUES, Flag.COUNTS))
    kind = Type(header.type)
    return frame_bytes(header.n, header.dim, kind, has_ids=has_ids, has_values=has_values, has_counts=has_counts)


def _decode_frame(message: bytes, at: int) -> tuple[Frame, int]:
    if len(message) - at < HEADER_BYTES:
        raise _wrong(f"expected a header of {HEADER_BYTES} bytes at byte {at}, got {len(message) - at}")
    magic, version, op, flags, *rest, checksum = _LAYOUT.unpack_from(message, at)
    if magic != MAGIC:
        raise _wrong(f"expected the mark {MAGIC:#x} at byte {at}, got {magic:#x}")
    if version != VERSION:
        raise _wrong(f"expected version {VERSION} of frames, got {version}; run one release of recforge everywhere")
    header = Header(op, flags, *rest)
    if op not in _OPS or flags & ~_ALL_FLAGS or header.type not in _TYPES:
        raise _wrong(f"expected a known op, flags and type, got {op}, {flags:#x}, {header.type}")
    length = length_of(header)
    if len(message) - at < length:
        raise _wrong(f"expected {length} bytes of a frame of {header.n} x {header.dim}, got {len(message) - at}")
    if not flags & _BODIES and header.n:
        raise _wrong(f"expected ids or values in a frame of {header.n} rows, got none")
    body = memoryview(message)[at + HEADER_BYTES : at + length]
    digest = xxhash.xxh3_64(memoryview(message)[at : at + _CHECKSUM_AT])
    digest.update(body)
    if digest.intdigest() != checksum:
        raise _wrong(f"expected checksum {checksum:#x} at byte {at}, got {digest.intdigest():#x}: damaged on the way")
    n_ids, n_values, n_counts = (header.n if flags & flag else 0 for flag in (Flag.IDS, Flag.VALUES, Flag.COUNTS))
    ids = np.frombuffer(body, _IDS, n_ids)
    values_at = _padded(ids.nbytes)
    values = np.frombuffer(body, DTYPES[Type(header.type)], n_values * header.dim, values_at)
    counts = np.frombuffer(body, _COUNTS, n_counts, values_at + _padded(values.nbytes))
    return Frame(header, ids, values.reshape(n_values, header.dim), counts), at + length


def _pack(header: Header) -> bytes:
    return _LAYOUT.pack(MAGIC, VERSION, *header, 0)[:_CHECKSUM_AT]


def _padded(length: int) -> int:
    return length + -length % _ALIGNMENT


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, f"frame: {message}")


_OPS, _TYPES = frozenset(Op), frozenset(Type)
_BODIES = int(Flag.IDS | Flag.VALUES | Flag.COUNTS)
_ALL_FLAGS = int(Flag.REPLY | Flag.DUPLICATE) | _BODIES  # the complement of a Flag has no other bits

"""What a shard checks of a message before it takes its lock: each frame is what its verb wants, and of this run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.shard.frame_checks import check_gradients, check_ids
from parameter_server.shard.lane_order import CLIENT_LANES
from parameter_server.wire import MAX_MESSAGE_BYTES, Flag, Frame, Header, Op, Type, frame_bytes

_MAX_CLOCK = 1 << 40


def check_pulls(frames: Sequence[Frame], description: RunDescription) -> int:
    """Checks PULL frames; returns how long the answer will be, in bytes.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    length = 0
    for frame in frames:
        header = frame.header
        dim = check_head(header, Op.PULL, description)
        if header.dim != dim or len(frame.ids) != header.n or len(frame.values):
            raise _wrong(f"table {header.table}: expected ids of rows of {dim} numbers, got {header.dim}, or no ids")
        check_ids(frame, description.tables[header.table])
        length += frame_bytes(header.n, header.dim, Type(header.type), has_ids=False, has_values=True)
    check_length(length)
    return length


def check_pushes(frames: Sequence[Frame], description: RunDescription, salts: Sequence[np.uint64]) -> None:
    """Checks PUSH frames.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    lanes = description.lanes + CLIENT_LANES
    for frame in frames:
        header = frame.header
        dim = check_head(header, Op.PUSH, description)
        if (header.n and header.dim != dim) or not len(frame.ids) == len(frame.values) == header.n:
            raise _wrong(f"table {header.table}: expected ids and as many gradients of {dim} numbers, got {header}")
        if not header.lane < lanes:
            raise _wrong(f"expected a lane below {lanes}, got {header.lane}")
        if not 1 <= header.clock <= _MAX_CLOCK:
            raise _wrong(f"lane {header.lane}: expected a clock from 1 to {_MAX_CLOCK}, got {header.clock}")
        if not (math.isfinite(header.factor) and math.isfinite(header.eps_factor)):
            raise _wrong(f"expected finite factors, got {header.factor} and {header.eps_factor}")
        if frame.counts.size and frame.counts.min() < 1:
            raise _wrong(f"table {header.table}: expected ids that occurred, got a count of 0")
        check_ids(frame, description.tables[header.table])
        check_gradients(frame, description.tables[header.table], salts[header.table])


def check_run(header: Header, op: Op, description: RunDescription) -> None:
    """Checks that a frame asks for what a verb does, of this run.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if header.op != op or header.flags & (Flag.REPLY | Flag.DUPLICATE | (0 if op == Op.PUSH else Flag.COUNTS)):
        raise _wrong(f"expected {op.name} frames, got op {header.op} with flags {header.flags:#x}")
    if header.run_id != description.run_id:
        raise _wrong(f"expected run {description.run_id}, got {header.run_id}: another run's server")


def check_length(length: int) -> None:
    """Checks that an answer may be so many bytes long.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    if length > MAX_MESSAGE_BYTES:
        raise _wrong(f"expected at most {MAX_MESSAGE_BYTES} bytes asked for at a time, got {length}")


def check_head(header: Header, op: Op, description: RunDescription) -> int:
    """Checks what ``check_run`` does, and that the table is one of the run's; returns its ``dim``.

    Raises:
        RefusedError: With INVALID_ARGUMENT.
    """
    check_run(header, op, description)
    if not header.table < len(description.tables):
        raise _wrong(f"expected a table below {len(description.tables)}, got {header.table}")
    return description.tables[header.table].dim


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, message)

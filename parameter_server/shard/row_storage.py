"""Whole rows of a shard, read and overwritten some at a time: how checkpoints of other modes come and go.

A message of RECORDS frames, each about one table:

- ids without values asks for rows: weight and optimizer states side by side, as ``columns_of`` orders them;
- ids with such values overwrites rows;
- neither, with ``SET_UPDATES`` as codec, sets the table's number of updates to the clock.

Each answer's clock is the table's number of updates. What is written is as durable as pushes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from embeddings.row_optimizers import state_columns
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.shard.marks import Places, check_not_frozen, check_places
from parameter_server.shard.message_checks import check_head, check_length
from parameter_server.shard.state import ShardState
from parameter_server.wire import Flag, Frame, Op, Type, encode, frame_bytes

Floats = NDArray[np.float32]
Parts = list[bytes | memoryview]

SET_UPDATES = 1
_MAX_UPDATES = 1 << 40


def columns_of(config: TableConfig) -> dict[str, int]:
    """Gives the numbers per row of ``weight`` and of each optimizer state, in their order."""
    states = {name: config.dim if whole else 1 for name, whole in state_columns(config.optimizer).items()}
    return {"weight": config.dim, **states}


def split_rows(config: TableConfig, rows: Floats) -> dict[str, Floats]:
    """Takes rows [n, width] apart: by name [n, dim], or [n] of states with one number per row."""
    whole = {"weight": True, **state_columns(config.optimizer)}
    parts, at = {}, 0
    for name, columns in columns_of(config).items():
        part = np.ascontiguousarray(rows[:, at : at + columns])
        parts[name] = part if whole[name] else part[:, 0]
        at += columns
    return parts


def join_rows(config: TableConfig, parts: Mapping[str, Floats]) -> Floats:
    """Puts together what ``split_rows`` has taken apart."""
    columns = [parts[name].reshape(-1, columns) for name, columns in columns_of(config).items()]
    return np.concatenate(columns, axis=1, dtype=np.float32)


def check_storage(frames: Sequence[Frame], description: RunDescription) -> None:
    """Checks what can be checked before any of a message is worked on.

    Raises:
        RefusedError: A frame is none of those that are understood, or an answer would be too long.
    """
    length = 0
    for frame in frames:
        header = frame.header
        check_head(header, Op.RECORDS, description)
        length += _check_frame(frame, description.tables[header.table])
    check_length(length)


def answer_storage(frames: Sequence[Frame], state: ShardState, places: Places) -> Parts:
    """Reads and overwrites rows; the frames are checked. Nothing is written if a row is elsewhere or about to be.

    Raises:
        RefusedError: A row's bucket is elsewhere, or is about to be.
    """
    for frame in frames:
        salt = state.salts[frame.header.table]
        check_places(frame.ids, salt, places)
        if frame.header.flags & Flag.VALUES:
            check_not_frozen(frame.ids, salt, places)
    parts: Parts = []
    for frame in frames:
        parts += _answer(frame, state)
    return parts


def _check_frame(frame: Frame, config: TableConfig) -> int:
    header, width = frame.header, sum(columns_of(config).values())
    if header.flags & Flag.IDS and header.dim != width:
        raise _wrong(f"table {config.name!r}: expected rows of {width} numbers, got {header.dim}")
    if header.flags & Flag.VALUES and (header.type != Type.FP32 or not header.flags & Flag.IDS):
        raise _wrong(f"table {config.name!r}: expected float32 rows with their ids, got others")
    if header.codec not in (0, SET_UPDATES) or not 0 <= header.clock <= _MAX_UPDATES:
        raise _wrong(f"table {config.name!r}: expected a known request, got {header}")
    ids = frame.ids
    if config.num_rows != UNBOUNDED and ids.size and not 0 <= ids.min() <= ids.max() < config.num_rows:
        raise _wrong(f"table {config.name!r}: expected ids in [0, {config.num_rows}), got {ids.min()} to {ids.max()}")
    if ids.size > 1 and not (ids[1:] > ids[:-1]).all():
        raise _wrong(f"table {config.name!r}: expected ids that ascend, got others")
    has_values = not header.flags & Flag.VALUES
    return frame_bytes(header.n, header.dim, Type.FP32, has_ids=False, has_values=has_values)


def _answer(frame: Frame, state: ShardState) -> Parts:
    header, number = frame.header, frame.header.table
    table, rows = state.tables[number], None
    if header.flags & Flag.VALUES:
        parts = split_rows(table.config, frame.values)
        table.put_rows(frame.ids, parts.pop("weight"), parts)
    elif header.flags & Flag.IDS:
        weight, states = table.read_rows(frame.ids)
        rows = join_rows(table.config, {"weight": weight, **states})
    elif header.codec == SET_UPDATES:
        state.base_updates[number] = header.clock - state.orders.clocks
    updates = state.base_updates[number] + state.orders.clocks
    answer = header._replace(flags=Flag.REPLY, n=0, clock=updates, version=table.version)
    return encode(answer, values=rows if header.n else None)


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, message)

"""How a shard's state is read back from its folder: snapshots, then the journal, the same changes in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parameter_server.dense_codec import PIECE_SALT
from parameter_server.description import RunDescription
from parameter_server.partition import buckets_of
from parameter_server.shard.acknowledged import AcknowledgedPushes
from parameter_server.shard.journal import read_journal
from parameter_server.shard.lane_order import CLIENT_LANES
from parameter_server.shard.marks import Fresh
from parameter_server.shard.records_file import Kind, Record, RecordsFile
from parameter_server.shard.row_storage import answer_storage
from parameter_server.shard.snapshots import SnapshotFolder
from parameter_server.shard.state import ALL_HERE, ShardState
from parameter_server.shard.state_parts import put_ending, put_part, unpack_part
from parameter_server.wire import Frame, decode

SNAPSHOTS, JOURNAL, ACKNOWLEDGED = "snapshots", "journal", "acknowledged"
Mask = NDArray[np.bool_]


@dataclass(kw_only=True)
class ReadBack:
    """What was found in a shard's folder.

    Attributes:
        next_record: Number of the journal's next record.
        saved: Versions of the tables in the newest snapshot.
        replayed: Records of the journal that were applied.
        torn: The last segment, if its tail is torn.
        lines: What a person should know.
    """

    next_record: int = 1
    saved: list[int] = field(default_factory=list)
    replayed: int = 0
    torn: RecordsFile | None = None
    lines: list[str] = field(default_factory=list)


def read_back(folder: Path, state: ShardState, snapshots: SnapshotFolder, only: Mask | None = None) -> ReadBack:
    """Brings a fresh state to where a shard was when it ended, however it did; changes nothing in the folder.

    Args:
        folder: Of the shard.
        state: Changed.
        snapshots: The folder's.
        only: [4096] buckets that are wanted; rows of others may be left out.

    Raises:
        DamagedError: The journal is damaged, or does not go on from the newest whole snapshot.
    """
    found = ReadBack(lines=list(snapshots.passed_over))
    for snapshot in snapshots.chain:
        for part in snapshot.parts(only):
            put_part(state, part, only)
            if "orders" in part:
                put_ending(state, part)
        found.next_record = max(1, snapshot.journal)
    # What is replayed has to be in the next snapshot.
    state.forget_changes()
    found.saved = state.versions
    if state.description.durability == "journal":
        for record in read_journal(folder / JOURNAL, found.next_record):
            if isinstance(record, RecordsFile):
                found.torn = record
                found.lines.append(
                    f"{record.path}: cut {record.torn_bytes} bytes off its end, of a record that was never acknowledged"
                )
            else:
                apply_record(state, record, only)
                found.replayed += 1
                found.next_record = record.number + 1
    state.lost += adopt_acknowledged(folder, state)
    return found


def apply_record(state: ShardState, record: Record, only: Mask | None = None) -> None:
    """Does again what a record says."""
    if record.kind == Kind.PUSH:
        (frame,) = decode(record.body)
        fresh = state.find_fresh(frame)
        state.push(frame, fresh if only is None else _narrow(fresh, only), record.seconds)
    elif record.kind == Kind.DENSE:
        (frame,) = decode(record.body)
        frame = frame if only is None else _keep_pieces(frame, only)
        if frame.ids.size:
            state.dense.apply(frame)
    elif record.kind == Kind.EVICT:
        state.evict(record.seconds)
    elif record.kind == Kind.PUT:
        put_part(state, unpack_part(record.body), only, restamp=True)
    elif record.kind == Kind.CLAIM:
        state.claims[:] = np.frombuffer(record.body, np.int64)
    elif record.kind == Kind.DROP:
        state.drop(np.frombuffer(record.body, np.bool_))
    elif record.kind == Kind.STORE:
        answer_storage(decode(record.body), state, ALL_HERE)
    else:
        raise ValueError(f"journal: expected a record of this release, got kind {record.kind}")


def read_claims(folder: Path, snapshots: SnapshotFolder, durability: str) -> NDArray[np.int64]:
    """Reads which buckets [4096] a shard held when it ended, without its rows."""
    claims, first, none = np.zeros_like(ALL_HERE, np.int64), 1, np.zeros_like(ALL_HERE, np.bool_)
    for snapshot in snapshots.chain:
        for part in snapshot.parts(none):
            claims = part.get("claims", claims)
        first = max(1, snapshot.journal)
    if durability == "journal":
        for record in read_journal(folder / JOURNAL, first):
            if isinstance(record, Record) and record.kind == Kind.CLAIM:
                claims = np.frombuffer(record.body, np.int64).copy()
            elif isinstance(record, Record) and record.kind == Kind.DROP:
                claims = np.where(np.frombuffer(record.body, np.bool_), 0, claims)
    return claims


def adopt_acknowledged(folder: Path, state: ShardState) -> int:
    """Goes on after the last pushes that were acknowledged; returns how many of these are not in the state.

    Senders go on from there: what was lost is not sent again, and is not to be mistaken for what is.
    """
    path = folder / ACKNOWLEDGED
    if not path.exists():
        return 0
    acknowledged = AcknowledgedPushes(path, count_lanes(state.description))
    try:
        return sum(state.orders.adopt(lane, known) for lane, known in acknowledged.read().items())
    finally:
        acknowledged.close()


def count_lanes(description: RunDescription) -> int:
    """Says how many lanes a shard knows at most."""
    return description.lanes + CLIENT_LANES


def _narrow(fresh: Fresh, only: Mask) -> Fresh:
    rows = only[fresh.buckets] if fresh.rows is None else only[fresh.buckets] & fresh.rows
    return Fresh(fresh.buckets, rows, int(rows.size - np.count_nonzero(rows)))


def _keep_pieces(frame: Frame, only: Mask) -> Frame:
    kept = only[buckets_of(frame.ids, PIECE_SALT)]
    header = frame.header._replace(n=int(np.count_nonzero(kept)))
    return Frame(header, frame.ids[kept], frame.values[kept] if len(frame.values) else frame.values)


def group_buckets(groups: int) -> Iterator[Mask]:
    """Parts all buckets into groups, as masks [4096]."""
    for some in np.array_split(np.arange(ALL_HERE.size), groups):
        mask = np.zeros(ALL_HERE.size, np.bool_)
        mask[some] = True
        yield mask

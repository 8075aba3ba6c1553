"""How shards of a run that has ended become others, fewer or more: each takes its buckets out of all old folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.hashed_table import Records
from parameter_server.shard.folder import PART_BYTES, check_description
from parameter_server.shard.lane_order import LaneOrder
from parameter_server.shard.replay import SNAPSHOTS, group_buckets, read_back, read_claims
from parameter_server.shard.snapshots import SnapshotFolder
from parameter_server.shard.state import ShardState, without_limits
from parameter_server.shard.state_parts import put_part, row_bytes, take_dense, take_marks

Mask = NDArray[np.bool_]
_ABOVE_COPIES = 1 << 62


@dataclass(frozen=True, kw_only=True)
class MergeInfo:
    """What was found in the folders of old shards.

    Attributes:
        rows: Taken over, of all tables.
        lost: Pushes that the old shards had acknowledged and that are not in their folders, of all buckets.
        lines: What a person should know.
    """

    rows: int
    lost: int
    lines: tuple[str, ...]


def merge_folders(state: ShardState, folders: Sequence[Path], buckets: Mask) -> MergeInfo:
    """Brings a fresh state to where old shards' buckets were when those ended; changes nothing in their folders.

    One old shard at a time is in memory, with the buckets that are wanted. Rows, marks and pieces of a bucket come
    from the shard that came to hold it last. Lanes' clocks are the highest of any shard's, and a lease goes on from
    push 1: what had been pushed is known by its marks.

    Raises:
        ValueError: A folder is of another run, or one of a shard that held some of the buckets is not among them.
        DamagedError: A journal is damaged.
    """
    snapshots = []
    for folder in folders:
        check_description(folder, state.description, None)
        snapshots.append(SnapshotFolder(folder / SNAPSHOTS, is_read_only=True))
    durability = state.description.durability
    claims = np.stack([read_claims(f, s, durability) for f, s in zip(folders, snapshots, strict=True)])
    lost, lines = 0, _find_missing(claims, buckets)
    ranks = np.where(claims > 0, claims + _ABOVE_COPIES, -claims)
    owners = np.where(claims.any(axis=0), ranks.argmax(axis=0), -1)
    versions = np.zeros(len(state.tables), np.int64)
    for number, folder in enumerate(folders):
        wanted = buckets & (owners == number)
        old = ShardState(without_limits(state.description))
        found = read_back(folder, old, snapshots[number], wanted)
        old.drop(~wanted)
        lost += old.lost
        lines += found.lines
        versions = np.maximum(versions, old.versions)
        for table, version in zip(state.tables, versions.tolist(), strict=True):
            table.version = version
        _take_over(state, old, wanted)
    state.claims[buckets] = np.abs(claims).max(axis=0)[buckets]
    return MergeInfo(rows=sum(table.num_rows for table in state.tables), lost=lost, lines=tuple(lines))


def _find_missing(claims: NDArray[np.int64], buckets: Mask) -> list[str]:
    """Says what a person should know of buckets [4096] that no folder tells of, given all claims [folders, 4096].

    Raises:
        ValueError: Each folder tells of some buckets, so that these were in yet another one.
    """
    missing = int(np.count_nonzero(buckets & ~claims.any(axis=0)))
    if not missing:
        return []
    if claims.any(axis=1).all():
        raise ValueError(
            f"--restore-from: expected the folders of all shards of the run, got none of those that held {missing} of "
            f"{buckets.sum()} buckets; name all of them"
        )
    return [f"{missing} buckets are in none of the folders, as some shard had not saved any: their rows begin anew"]


def _take_over(state: ShardState, old: ShardState, wanted: Mask) -> None:
    for table, source in zip(state.tables, old.tables, strict=True):
        for group in group_buckets(1 + row_bytes(source) // PART_BYTES):
            records = source.take(buckets=wanted & group)
            table.put(Records(records.ids, records.rows), version=table.version)
    put_part(state, take_marks(old, sorted(old.marks.lanes), wanted) | take_dense(old, wanted))
    for lane, order in old.orders.lanes.items():
        state.orders.adopt(lane, LaneOrder(lease=order.lease, next_seq=1, clock=order.clock))
    state.base_updates = [max(pair) for pair in zip(state.base_updates, old.base_updates, strict=True)]

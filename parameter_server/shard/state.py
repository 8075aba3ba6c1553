"""What a shard keeps: its tables, and what makes pushes exactly-once; the same changes give the same state, bit by bit.

Nothing here knows of locks, files or routes: a shard changes its state as calls come, a restart as the journal says.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.growth import Growth
from embeddings.hashed.hashed_table import HashedTable
from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.description import RunDescription
from parameter_server.partition import salt_of
from parameter_server.shard.dense_pieces import DensePieces
from parameter_server.shard.lane_order import LaneOrders
from parameter_server.shard.marks import HERE, Fresh, Marks, Places
from parameter_server.wire import Frame, Header, Longs

ALL_HERE: Places = np.full(NUM_BUCKETS, HERE, np.uint8)


def without_limits(description: RunDescription) -> RunDescription:
    """Gives the run with room for all rows: where a state is only read back, what had to go has gone."""
    growth = {name: replace(rules, max_bytes=None, spill=False) for name, rules in description.growth.items()}
    return replace(description, growth=growth)


class ShardState:
    """The tables of one shard, and how far lanes and buckets have come.

    Attributes:
        tables: By number.
        salts: Of the tables.
        marks: Of lanes and buckets.
        orders: Of lanes.
        base_updates: Of each table: its updates before the first clock, where training goes on from a checkpoint.
        claims: [4096] int64: the epoch of routes since which a bucket's rows are whole here, or 0. Below 0: they are a
            copy, for routes that may never be. Where two shards' folders tell of one bucket, the higher claim is right,
            and a copy only where there is no other.
        dense: The pieces of the dense part that lie here.
        lost: Pushes that were acknowledged since the run began and that a crash took.
        dropped: [4096] buckets that were dropped since somebody last asked with ``take_dropped``.
        removed: Of each table, ids that other shards had evicted, likewise.
    """

    def __init__(self, description: RunDescription, spill_folder: Path | None = None) -> None:
        self.description = description
        if spill_folder is not None:
            shutil.rmtree(spill_folder, ignore_errors=True)  # what it held is in snapshots and the journal
        self.salts = [salt_of(config.name) for config in description.tables]
        self.tables = [
            HashedTable(
                config,
                seed=description.seed,
                salt=salt,
                growth=description.growth.get(config.name, Growth()),
                spill_folder=None if spill_folder is None else spill_folder / str(number),
            )
            for number, (config, salt) in enumerate(zip(description.tables, self.salts, strict=True))
        ]
        self.marks = Marks()
        self.orders = LaneOrders()
        self.base_updates = [0] * len(self.tables)
        self.claims: Longs = np.zeros(NUM_BUCKETS, np.int64)
        self.dense = DensePieces(description)
        self.lost = 0
        self.dropped: NDArray[np.bool_] = np.zeros(NUM_BUCKETS, np.bool_)
        self.removed: list[list[Longs]] = [[] for _ in self.tables]

    @property
    def versions(self) -> list[int]:
        """The tables' versions."""
        return [table.version for table in self.tables]

    def find_fresh(self, frame: Frame, places: Places = ALL_HERE) -> Fresh:
        """Finds which rows of a push are new; changes nothing.

        Raises:
            RefusedError: A row's bucket is elsewhere, or is about to be.
        """
        header = frame.header
        return self.marks.find_fresh(header.lane, self._stamp(header), frame.ids, self.salts[header.table], places)

    def push(self, frame: Frame, fresh: Fresh, now: float) -> None:
        """Applies the new rows of a push, and takes down that it has been applied.

        Args:
            frame: Checked, and next in its lane's order.
            fresh: What ``find_fresh`` says of it.
            now: Seconds since 1970.

        Raises:
            ValueError: An id is not of the table, or is there twice; nothing has changed.
        """
        header, table = frame.header, self.tables[frame.header.table]
        if fresh.skipped == header.n:
            table.count_change()
        else:
            ids, gradients, counts = frame.ids, frame.values, frame.counts.astype(np.int64)
            if fresh.rows is not None:
                ids, gradients = ids[fresh.rows], gradients[fresh.rows]
                counts = counts[fresh.rows] if counts.size else counts
            updates = self.base_updates[header.table] + self.orders.clocks_with(header)
            table.push(
                ids,
                gradients,
                updates=updates,
                factor=header.factor,
                eps_factor=header.eps_factor,
                now=now,
                counts=counts,
            )
            self.marks.set(header.lane, self._stamp(header), fresh)
        self.orders.advance(header)

    def drop(self, buckets: NDArray[np.bool_]) -> None:
        """Forgets all that lies in buckets [4096]."""
        for table in self.tables:
            table.drop(buckets)
        self.dense.drop(buckets)
        self.marks.clear(buckets)
        self.claims[buckets] = 0
        self.dropped |= buckets

    def forget_changes(self) -> None:
        """Takes what there is as known to be kept already."""
        self.marks.changed.clear()
        self.dropped[:] = False
        for removed in self.removed:
            removed.clear()

    def evict(self, now: float) -> int:
        """Evicts rows that are too old; returns how many."""
        return sum(table.evict(now) for table in self.tables)

    def close(self) -> None:
        """Closes the files of rows on disk."""
        for table in self.tables:
            table.close()

    def _stamp(self, header: Header) -> int:
        return header.clock * len(self.tables) + header.table

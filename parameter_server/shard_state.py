"""What a shard keeps: its tables, and what makes pushes exactly-once; the same changes give the same state, bit for bit.

Nothing here knows of locks, files or routes: a shard changes its state as calls come, and a restart as the journal says.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from embeddings.hashed.hashed_table import HashedTable
from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.description import Growth, RunDescription
from parameter_server.lane_order import LaneOrders
from parameter_server.marks import HERE, Fresh, Marks, Places
from parameter_server.partition import salt_of
from parameter_server.wire import Frame, Header, Longs

ALL_HERE: Places = np.full(NUM_BUCKETS, HERE, np.uint8)


class ShardState:
    """The tables of one shard, and how far lanes and buckets have come.

    Attributes:
        tables: By number.
        salts: Of the tables.
        marks: Of lanes and buckets.
        orders: Of lanes.
        base_updates: Of each table: its updates before the first clock, where training goes on from a checkpoint.
        claims: [4096] int64: the epoch of routes since which a bucket's rows are whole here, or 0. Where two shards'
            folders tell of one bucket, the higher claim is right.
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
        """
        header, table = frame.header, self.tables[frame.header.table]
        self.orders.advance(header)
        if fresh.skipped == header.n:
            table.count_change()
            return
        ids, gradients = frame.ids, frame.values
        if fresh.rows is not None:
            ids, gradients = ids[fresh.rows], gradients[fresh.rows]
        table.push(
            ids,
            gradients,
            updates=self.base_updates[header.table] + self.orders.clocks,
            factor=header.factor,
            eps_factor=header.eps_factor,
            now=now,
        )
        self.marks.set(header.lane, self._stamp(header), fresh)

    def evict(self, now: float) -> int:
        """Evicts rows that are too old; returns how many."""
        return sum(table.evict(now) for table in self.tables)

    def _stamp(self, header: Header) -> int:
        return header.clock * len(self.tables) + header.table

"""Tables for inference that a feed keeps up to date: rows without states, and births of those that are not there."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.hashed_table import HashedTable
from embeddings.row_optimizers import RowSGD
from parameter_server.description import RunDescription
from parameter_server.partition import salt_of

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]

_NO_OPTIMIZER = RowSGD(learning_rate=0.0)


class ServedTables:
    """All tables of a run, for a ``FeedReader`` to fill while any number of threads look rows up.

    Args:
        description: Of the run.
    """

    def __init__(self, description: RunDescription) -> None:
        self._tables = [
            HashedTable(replace(config, optimizer=_NO_OPTIMIZER), seed=description.seed, salt=salt_of(config.name))
            for config in description.tables
        ]
        self._numbers = {config.name: number for number, config in enumerate(description.tables)}
        self._locks = [threading.Lock() for _ in self._tables]

    @property
    def num_rows(self) -> list[int]:
        """Rows of each table, by number."""
        return [table.num_rows for table in self._tables]

    def look_up(self, table: int | str, ids: Longs) -> Floats:
        """Gives rows [n, dim]; of ids without a row, what a trainer would see: the row as it would be born.

        Args:
            table: Its number or name.
            ids: [n], in any order.
        """
        number = self._numbers[table] if isinstance(table, str) else table
        held = self._tables[number]
        rows = np.empty((ids.size, held.config.dim), np.float32)
        with self._locks[number]:
            held.pull(ids, rows)
        return rows

    def put(self, table: int, ids: Longs, weights: Floats) -> None:
        """See ``RowsTarget``."""
        with self._locks[table]:
            self._tables[table].put_rows(ids, weights, {})

    def drop(self, table: int, ids: Longs) -> None:
        """See ``RowsTarget``."""
        held = self._tables[table]
        with self._locks[table]:
            held.remove(ids)
            held.forget_evicted(held.version + 1)  # nobody asks these tables which rows went

    def held(self, table: int) -> Longs:
        """See ``RowsTarget``."""
        with self._locks[table]:
            return self._tables[table].take().ids

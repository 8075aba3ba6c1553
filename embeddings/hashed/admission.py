"""Rows that are pushed too seldom to be kept: they are only counted, in 24 bytes and 12 of the map."""

from __future__ import annotations

import numpy as np

from embeddings.hashed.eviction import find_least_recent, find_older
from embeddings.hashed.growth import Growth
from embeddings.hashed.record_columns import Counts, Meta, make_meta
from embeddings.hashed.row_store import Longs, Mask, RowStore
from embeddings.initial_rows import random_stream
from embeddings.kernels.hash_kernels import draw_chances
from embeddings.tables import TableConfig

MOST_COUNTED = 1 << 20
"""Ids that are counted at a time; of more, those that were pushed least recently are forgotten."""
_ADMISSIONS = -1  # in place of the number of an update


class Admission:
    """Counts the pushes of rows that do not exist, and says which come into being.

    The counts are exact. Everything is a function of the pushes, of nothing else: a replay decides alike.

    Args:
        config: The table.
        growth: Its rules.
        seed: Of the table.
        salt: Of hashes.
        most_counted: See ``MOST_COUNTED``.
    """

    def __init__(
        self, config: TableConfig, growth: Growth, *, seed: int, salt: np.uint64, most_counted: int = MOST_COUNTED
    ) -> None:
        self.counted = RowStore(0, salt=salt)
        self._growth = growth
        self._key = np.uint64(random_stream(config, seed, _ADMISSIONS))
        self._most = most_counted

    def admit(self, ids: Longs, version: int, seen: int) -> tuple[Mask, Counts]:
        """Counts a push of rows that do not exist.

        Args:
            ids: [n], each once.
            version: Of the push.
            seen: Its time, in seconds.

        Returns:
            Which of them come into being, and how many pushes each has had, this one included.
        """
        slots, _ = self.counted.insert(ids)
        counts = self.counted.read_meta(slots).counts + np.uint32(1)
        self.counted.write(slots, make_meta(counts, seen, version, ids.size))
        admitted = counts >= self._growth.admit_after
        if self._growth.admit_probability < 1:
            chances = np.empty(ids.size)
            draw_chances(ids, counts, self._key, chances)
            admitted &= chances < self._growth.admit_probability
        self.counted.remove(ids[admitted])
        return admitted, counts

    def forget_most(self) -> Longs:
        """Forgets a quarter of what is counted, where that is too much; gives the ids."""
        if len(self.counted) <= self._most:
            return np.empty(0, np.int64)
        ids = self.counted.ids_of(find_least_recent(self.counted, len(self.counted) - self._most * 3 // 4))
        self.counted.remove(ids)
        return ids

    def forget_older(self, now: float, seconds: float) -> Longs:
        """Forgets those without a push for so long; gives the ids."""
        ids = self.counted.ids_of(find_older(self.counted, now, seconds))
        self.counted.remove(ids)
        return ids

    def take(self, *, buckets: Mask | None, since: int) -> tuple[Longs, Meta]:
        """Copies what changed after a version."""
        slots = self.counted.list_slots(since=since, buckets=buckets)
        return self.counted.ids_of(slots), self.counted.read_meta(slots)

    def put(self, ids: Longs, meta: Meta) -> None:
        """Writes counts, times and versions over those of ids [n]."""
        slots, _ = self.counted.insert(ids)
        self.counted.write(slots, make_meta(*meta, ids.size))


def counts_first(growth: Growth) -> bool:
    """Says whether a row may have to be pushed several times before it is kept."""
    return growth.admit_after > 1 or growth.admit_probability < 1

"""Which rows go: those that nobody pushes any more, and those pushed least recently where there is no room for all.

Each choice is a function of the rows and the time given, so that a replay chooses alike.
"""

from __future__ import annotations

import numpy as np

from embeddings.hashed.record_columns import Meta, make_meta
from embeddings.hashed.row_store import Longs, Mask, RowStore


def is_older(meta: Meta, now: float, seconds: float, below_count: int | None = None) -> Mask:
    """Says of each row whether its last push is so long ago, and whether it has had fewer pushes than a number."""
    older: Mask = (meta.seen > 0) & (now - meta.seen >= seconds)
    return older if below_count is None else older & (meta.counts < below_count)


def find_older(store: RowStore, now: float, seconds: float, below_count: int | None = None) -> Longs:
    """Finds slots of rows that ``is_older`` says yes of."""
    slots = store.list_slots()
    return slots[is_older(store.read_meta(slots), now, seconds, below_count)]


def find_least_recent(store: RowStore, count: int) -> Longs:
    """Finds slots of so many rows whose last change is the longest ago; of one push's rows, those with least ids."""
    slots = store.list_slots()
    versions = store.read_meta(slots).versions
    last = np.partition(versions, count - 1)[count - 1]
    before, level = slots[versions < last], slots[versions == last]
    return np.concatenate([before, level[np.argsort(store.ids_of(level))[: count - before.size]]])


class EvictedIds:
    """Ids of rows that are no more, until they come back or nobody needs to be told.

    Args:
        salt: Of hashes.
    """

    def __init__(self, *, salt: np.uint64) -> None:
        self._store = RowStore(0, salt=salt)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self._store.num_bytes

    def add(self, ids: Longs, version: int) -> None:
        """Notes that rows went, as which change."""
        slots, _ = self._store.insert(ids)
        self._store.write(slots, make_meta(0, 0, version, ids.size))

    def remove(self, ids: Longs) -> None:
        """Forgets ids whose rows are back."""
        if len(self._store):
            self._store.remove(ids)

    def list_since(self, version: int) -> Longs:
        """Lists ids that went after a version."""
        return self._store.list_ids(since=version)

    def drop(self, buckets: Mask) -> None:
        """Forgets the ids of buckets."""
        self._store.remove(self._store.list_ids(buckets=buckets))

    def forget(self, before_version: int) -> None:
        """Forgets ids that went before a version."""
        slots = self._store.list_slots()
        self._store.remove(self._store.ids_of(slots[self._store.read_meta(slots).versions < before_version]))

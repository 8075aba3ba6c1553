"""Records by id, in memory that grows without being copied: what tables on demand, and their book-keeping, stand on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.record_columns import Meta, meta_of
from embeddings.kernels import id_map_kernels, record_kernels
from embeddings.kernels.record_kernels import BLOCK_RECORDS, ID_WORDS, META_WORDS
from embeddings.local.row_memory import zero_array

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]

ALL_BUCKETS = np.empty(0, np.bool_)
_FEWEST_ENTRIES = 1 << 10
_MOST_FILLED = 0.7  # of the map's entries


class RowStore:
    """Records of ids: some float32 words, then a count, the time of the last push, a version and the id.

    Blocks of 65,536 records are added where there is no room, and slots of removed rows are used again. Not safe for
    several threads.

    Args:
        words: Of each record, as callers see them.
        salt: Of hashes of ids.
    """

    def __init__(self, words: int, *, salt: np.uint64) -> None:
        self.words = words + words % 2  # so that a version begins at a multiple of 8 bytes
        self.record_width = self.words + META_WORDS
        self.stride = self.record_width + ID_WORDS
        self.salt = np.uint64(salt)
        self.entries = _no_entries(_FEWEST_ENTRIES)
        self.blocks = np.empty(0, np.int64)  # addresses
        self._held: list[NDArray[np.generic]] = []  # their memory
        self._free = np.empty(0, np.int64)
        self._num_free = 0
        self._used = 0

    def __len__(self) -> int:
        return self._used - self._num_free

    @property
    def num_bytes(self) -> int:
        """Bytes of records and of the map."""
        return len(self) * self.stride * 4 + self.entries.nbytes

    def find(self, ids: Longs) -> tuple[Longs, int]:
        """Gives the slot of each id [n], or -1, and how many have none."""
        slots = np.empty(ids.size, np.int64)
        missing = id_map_kernels.find_slots(self.entries, self.blocks, self.stride, self.salt, ids, slots)
        return slots, missing

    def insert(self, ids: Longs) -> tuple[Longs, Mask]:
        """Gives the slot of each id [n], and whether it is a new one, with a record of zeros."""
        slots, missing = self.find(ids)
        new = slots < 0
        if missing:
            self._make_room(missing)
            absent = np.flatnonzero(new)
            places, are_new = np.empty(missing, np.int64), np.empty(missing, np.bool_)
            arguments = (self.entries, self.blocks, self.stride, self.salt, ids[absent])
            counts = (self._free, self._num_free, self._used)
            self._num_free, self._used = id_map_kernels.insert_ids(*arguments, *counts, places, are_new)
            slots[absent], new[absent] = places, are_new
        return slots, new

    def remove(self, ids: Longs) -> int:
        """Removes ids [n]; those that are not here are left out. Returns how many were."""
        before = len(self)
        most = self._num_free + min(ids.size, before)
        if self._free.size < most:
            self._free = np.concatenate([self._free, np.empty(max(most, 2 * self._free.size), np.int64)])
        self._num_free = id_map_kernels.remove_ids(
            self.entries, self.blocks, self.stride, self.salt, ids, self._free, self._num_free
        )
        return before - len(self)

    def list_slots(self, *, since: int = -1, buckets: Mask | None = None) -> Longs:
        """Lists slots of records whose version is above ``since``, of all buckets or of those in a mask [4096]."""
        slots = np.empty(self._used, np.int64)
        wanted = ALL_BUCKETS if buckets is None else buckets
        found = record_kernels.list_slots(self.blocks, self.stride, self._used, since, wanted, self.salt, slots)
        return slots[:found]

    def list_ids(self, *, since: int = -1, buckets: Mask | None = None) -> Longs:
        """Lists the ids in those slots."""
        return self.ids_of(self.list_slots(since=since, buckets=buckets))

    def ids_of(self, slots: Longs) -> Longs:
        """Gives the id in each slot [n]."""
        ids = np.empty(slots.size, np.int64)
        record_kernels.read_ids(self.blocks, self.stride, slots, ids)
        return ids

    def read(self, slots: Longs, first: int = 0, words: int | None = None) -> Floats:
        """Copies words of records, from ``first`` on: [n, words]."""
        rows = np.empty((slots.size, self.record_width - first if words is None else words), np.float32)
        record_kernels.read_records(self.blocks, self.stride, slots, first, rows)
        return rows

    def write(self, slots: Longs, rows: Floats, first: int = 0) -> None:
        """Overwrites words of records, from ``first`` on, by rows [n, words]."""
        record_kernels.write_records(self.blocks, self.stride, slots, first, np.ascontiguousarray(rows))

    def read_meta(self, slots: Longs) -> Meta:
        """Copies what ends records [n]."""
        return meta_of(self.read(slots, self.words))

    def _make_room(self, more: int) -> None:
        size = self.entries.size
        while len(self) + more > _MOST_FILLED * size:
            size *= 2
        if size > self.entries.size:
            self.entries = _no_entries(size)
            id_map_kernels.fill_entries(self.entries, self.blocks, self.stride, self.salt, self._used)
        while len(self._held) * BLOCK_RECORDS < self._used + more - self._num_free:
            block = zero_array(BLOCK_RECORDS, self.stride)
            self._held.append(block)
            self.blocks = np.append(self.blocks, block.ctypes.data)


def _no_entries(size: int) -> NDArray[np.uint64]:
    return zero_array(size, dtype=np.uint64).view(np.uint64)

"""The rows that a table has: in memory, and those beyond it on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.eviction import find_least_recent, find_older, is_older
from embeddings.hashed.growth import Growth
from embeddings.hashed.record_columns import Records, make_meta, meta_of
from embeddings.hashed.row_store import RowStore
from embeddings.hashed.spilled_rows import SpilledRows

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]

_KEPT_SHARE = 7 / 8  # of ``max_bytes``, once they were passed: so that it does not happen at each push


class KeptRows:
    """Records by id. Each is in memory or, where ``growth`` has it spilled, on disk.

    Args:
        words: See ``RowStore``.
        salt: Of hashes of ids.
        growth: When rows go.
        spill_folder: Emptied; needed where ``growth`` says ``spill``.

    Attributes:
        memory: Those in memory.
    """

    def __init__(self, words: int, *, salt: np.uint64, growth: Growth, spill_folder: Path | None) -> None:
        self.memory = RowStore(words, salt=salt)
        most, each = growth.max_bytes, self.memory.stride * 4
        if most is not None and most < each:
            raise ValueError(f"max_bytes: expected at least those of a row, {each}, got {most}")
        self._growth = growth
        self._disk: SpilledRows | None = None
        if growth.spill:
            if spill_folder is None:
                raise ValueError("spill: expected a folder for rows beyond max_bytes, got none")
            self._disk = SpilledRows(spill_folder, self.memory.record_width, salt=salt)

    def __len__(self) -> int:
        return len(self.memory) + (len(self._disk) if self._disk else 0)

    def read_spilled(self, ids: Longs) -> tuple[Mask, Floats]:
        """Says which of ids [n] are on disk, and gives the records of those."""
        if self._disk is None or not len(self._disk):
            return np.zeros(ids.size, np.bool_), np.empty((0, self.memory.record_width), np.float32)
        return self._disk.read(ids)

    def find(self, ids: Longs) -> Longs:
        """Gives the slot of each id [n] in memory, or -1; rows that are on disk come back first."""
        slots, missing = self.memory.find(ids)
        if missing and self._disk is not None and len(self._disk):
            absent = np.flatnonzero(slots < 0)
            there, rows = self._disk.take(ids[absent])
            back = absent[there]
            slots[back], _ = self.memory.insert(ids[back])
            self.memory.write(slots[back], rows)
        return slots

    def read(self, ids: Longs) -> tuple[Mask, Floats]:
        """Says which of ids [n] have a row, and gives the records of those; brings none back."""
        slots, _ = self.memory.find(ids)
        there = slots >= 0
        rows = np.empty((ids.size, self.memory.record_width), np.float32)
        rows[there] = self.memory.read(slots[there])
        absent = np.flatnonzero(~there)
        spilled, its = self.read_spilled(ids[absent])
        rows[absent[spilled]] = its
        there[absent[spilled]] = True
        return there, rows[there]

    def take(self, *, buckets: Mask | None, since: int) -> list[Records]:
        """Copies rows that changed after a version, of all buckets or of those in a mask [4096]."""
        slots = self.memory.list_slots(since=since, buckets=buckets)
        in_memory = Records(self.memory.ids_of(slots), self.memory.read(slots))
        return [in_memory, *self._scan_spilled(buckets=buckets, since=since)]

    def list_ids(self, *, buckets: Mask | None, since: int) -> list[Longs]:
        """Lists ids of rows that changed after a version, likewise."""
        in_memory = self.memory.list_ids(since=since, buckets=buckets)
        return [in_memory, *(records.ids for records in self._scan_spilled(buckets=buckets, since=since))]

    def put(self, ids: Longs, rows: Floats) -> None:
        """Writes records [n, record_width] over those of ids [n], or beside them."""
        if self._disk is not None:
            self._disk.remove(ids)
        self.put_new(ids, rows)

    def put_new(self, ids: Longs, rows: Floats) -> Longs:
        """Writes records of ids that are not on disk, likewise; gives their slots in memory."""
        slots, _ = self.memory.insert(ids)
        self.memory.write(slots, rows)
        return slots

    def remove(self, ids: Longs) -> int:
        """Removes ids [n]; those that have no row are left out. Returns how many had one."""
        return self.memory.remove(ids) + (self._disk.remove(ids) if self._disk else 0)

    def find_older(self, now: float, seconds: float) -> Longs:
        """Lists ids of rows that are too old, as ``is_older`` says, and have had too few pushes to stay."""
        below = self._growth.evict_below_count
        found = [self.memory.ids_of(find_older(self.memory, now, seconds, below))]
        for ids, rows in self._disk.scan_seen_until(now - seconds) if self._disk else ():
            found.append(ids[is_older(meta_of(rows), now, seconds, below)])
        return np.concatenate(found)

    def date(self, seen: int, version: int) -> bool:
        """Writes a time into rows that have none, as a change of a version; says whether there were any."""
        slots = self.memory.list_slots()
        meta = self.memory.read_meta(slots)
        undated = meta.seen == 0
        rows = make_meta(meta.counts[undated], seen, version, int(undated.sum()))
        self.memory.write(slots[undated], rows, self.memory.words)
        found = bool(undated.any())
        if self._disk is None:
            return found
        for ids, spilled in self._disk.scan_seen_until(0):
            undated = meta_of(spilled).seen == 0
            some = spilled[undated]
            meta_of(some).seen[:], meta_of(some).versions[:] = seen, version
            self._disk.overwrite(ids[undated], some)
            found |= some.size > 0
        return found

    def spill(self) -> None:
        """Moves the least recently changed rows to disk, where ``growth`` says so and there are too many."""
        if self._disk is None or not (count := self._count_excess()):
            return
        slots = find_least_recent(self.memory, count)
        ids = self.memory.ids_of(slots)
        self._disk.write(ids, self.memory.read(slots))
        self.memory.remove(ids)

    def find_excess(self) -> Longs:
        """Lists ids of the least recently changed rows, where there are too many and none goes to disk."""
        count = 0 if self._disk is not None else self._count_excess()
        return self.memory.ids_of(find_least_recent(self.memory, count)) if count else np.empty(0, np.int64)

    def close(self) -> None:
        """Closes the files."""
        if self._disk is not None:
            self._disk.close()

    def _scan_spilled(self, *, buckets: Mask | None, since: int) -> Iterator[Records]:
        if self._disk is None or self._disk.newest <= since:
            return
        for ids, rows in self._disk.scan(buckets):
            wanted = meta_of(rows).versions > since
            yield Records(ids[wanted], rows[wanted])

    def _count_excess(self) -> int:
        most, each = self._growth.max_bytes, self.memory.stride * 4
        if most is None or len(self.memory) * each <= most:
            return 0
        return len(self.memory) - int(most * _KEPT_SHARE / each)

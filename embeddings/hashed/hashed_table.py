"""A table whose rows come into being when they are pushed, and of which one process holds some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.admission import Admission, counts_first
from embeddings.hashed.births import Births
from embeddings.hashed.eviction import EvictedIds
from embeddings.hashed.growth import Growth
from embeddings.hashed.kept_rows import KeptRows
from embeddings.hashed.push_checks import as_integers, check_config, check_ids, check_pull, check_push
from embeddings.hashed.record_columns import Columns, Meta, Records, join_records, make_meta, meta_of
from embeddings.kernels.hashed_row_kernels import pull_rows, push_rows
from embeddings.local.row_updates import settings_of
from embeddings.tables import TableConfig

__all__ = ["HashedTable", "Records"]

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Counts = NDArray[np.uint32]
Mask = NDArray[np.bool_]
Values = NDArray[np.float32] | NDArray[np.float16]

_NO_COUNTS = np.empty(0, np.int64)
_KEEP_ALL = Growth()
_ONLY_COUNTED = np.uint32(1 << 31)  # in the number of pushes: of an id whose row does not exist yet


class HashedTable:
    """Rows by id, born at their first push with the values that ``initial_rows`` says. Not safe for several threads.

    The same calls, in the same order and with the same times, make the same rows; so do they go on after ``take`` and
    ``put``. An id has a row, or is counted, or is listed as evicted, or is unknown.

    Args:
        config: The table. ``num_rows`` bounds ids and costs nothing; ``UNBOUNDED``: any int64 is an id.
        seed: Of rows' first values.
        salt: Of hashes of ids, see ``hash_kernels``.
        growth: When rows come and go.
        spill_folder: Emptied; where rows beyond ``growth.max_bytes`` go with ``growth.spill``.

    Attributes:
        version: How many changes there were: pushes, and evictions. Whoever restores records sets it.
        record_width: Numbers per record.
        num_evicted: Rows that were evicted by this object.
        evictions_since: The version since which ``evicted`` knows all of them.

    Raises:
        ValueError: When rows of such a table cannot be updated one by one, or there is nowhere to spill to.
    """

    def __init__(
        self,
        config: TableConfig,
        *,
        seed: int,
        salt: np.uint64,
        growth: Growth = _KEEP_ALL,
        spill_folder: Path | None = None,
    ) -> None:
        check_config(config)
        self.config, self.growth = config, growth
        self.version, self.num_evicted, self.evictions_since = 0, 0, 0
        self._births = Births(config, seed=seed)
        self._columns = Columns(config)
        self._rows = KeptRows(self._columns.words, salt=salt, growth=growth, spill_folder=spill_folder)
        self.record_width = self._rows.memory.record_width
        self._evicted = EvictedIds(salt=salt)
        self._admission = Admission(config, growth, seed=seed, salt=salt) if counts_first(growth) else None

    @property
    def num_rows(self) -> int:
        """How many rows it has, in memory and on disk."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory of rows, their states, maps of ids, and what is counted and listed beside."""
        counted: int = self._admission.counted.num_bytes if self._admission else 0
        return self._rows.memory.num_bytes + self._evicted.num_bytes + counted

    def pull(self, ids: Longs, out: Values) -> None:
        """Reads rows and changes nothing; those that do not exist read as they would be born.

        Args:
            ids: [n], in any order.
            out: [n, dim] of float32 or float16, contiguous; written.

        Raises:
            ValueError: When an id is outside the table.
        """
        check_pull(self.config, ids, out)
        missing, rows = np.empty(ids.size, np.int64), self._rows.memory
        flat = as_integers(out)
        count = pull_rows(rows.entries, rows.blocks, rows.stride, rows.salt, ids, self.config.dim, flat, missing)
        if count:
            self._pull_missing(ids, missing[:count], out)

    def push(
        self,
        ids: Longs,
        gradients: Values,
        *,
        updates: int,
        factor: float = 1.0,
        eps_factor: float = 1.0,
        now: float,
        counts: Longs = _NO_COUNTS,
    ) -> None:
        """Updates rows; those that do not exist are born first, if admitted. Adds one to ``version``.

        Args:
            ids: [n], each once.
            gradients: [n, dim], contiguous: of the sum over a row's occurrences.
            updates: Of the table, this one included; see ``RowAdam``.
            factor: Of the learning rate.
            eps_factor: Of the optimizer's ``eps``.
            now: Seconds since 1970.
            counts: How often each id occurred, [n], which ``RowCowClip`` asks for; by default once.

        Raises:
            ValueError: When an id is outside the table or given twice, or shapes do not fit; nothing was changed then.
        """
        check_push(self.config, self._rows.memory.salt, ids, gradients, counts)
        as_integers(gradients)
        self.version += 1
        slots, kept = self._open_rows(ids, int(now))
        if kept is not None:
            gradients, counts = gradients[kept], counts[kept] if counts.size else counts
        settings = settings_of(self.config, updates, factor, eps_factor)
        rows, is_half = self._rows.memory, gradients.dtype == np.float16
        where = (rows.blocks, rows.stride, slots, gradients.ctypes.data, is_half, np.array(counts))
        push_rows(*where, self._columns.layout, settings, self.version, int(now))
        self._rows.spill()
        self._evict(self._rows.find_excess())

    def count_change(self) -> None:
        """Adds one to ``version``, as a push without rows does."""
        self.version += 1

    def take(self, *, buckets: Mask | None = None, since: int = 0) -> Records:
        """Copies rows that changed after a version: of all buckets, or of those that a mask [4096] names."""
        parts = self._rows.take(buckets=buckets, since=since)
        if self._admission is not None:
            ids, meta = self._admission.take(buckets=buckets, since=since)
            parts.append(self._make_records(ids, self._births.draw(ids), {}, meta.counts | _ONLY_COUNTED, *meta[1:]))
        return join_records(parts)

    def list_ids(self, *, buckets: Mask | None = None, since: int = 0) -> Longs:
        """Lists the ids of what ``take`` copies."""
        ids = self._rows.list_ids(buckets=buckets, since=since)
        if self._admission is not None:
            ids.append(self._admission.counted.list_ids(buckets=buckets, since=since))
        return np.concatenate(ids)

    def put(self, records: Records, *, version: int | None = None) -> None:
        """Writes records over rows, or beside them, as they are; ``version`` becomes the latest of theirs, or stays.

        Args:
            records: Of a table with the same configuration, each id once.
            version: Replaces theirs, which are another table's where rows moved here from another shard: the next
                ``take(since=...)`` here would miss them.

        Raises:
            ValueError: When they are another table's; nothing was changed then.
        """
        ids, rows = records
        if rows.shape != (ids.size, self.record_width) or rows.dtype != np.float32:
            expected, got = f"float32 {(ids.size, self.record_width)}", f"{rows.dtype} {rows.shape}"
            raise ValueError(f"table {self.config.name!r}: expected records of {expected}, got {got}")
        check_ids(self.config, ids)
        rows = np.array(rows, order="C") if version is not None else np.ascontiguousarray(rows)
        meta = meta_of(rows)
        if version is not None:
            meta.versions[:] = version
        self.version = max(self.version, int(meta.versions.max(initial=0)))
        counted = (meta.counts & _ONLY_COUNTED) > 0
        if counted.any():
            some = Meta(meta.counts[counted] & ~_ONLY_COUNTED, meta.seen[counted], meta.versions[counted])
            self._discard(ids[counted])
            if self._admission is not None:
                self._admission.put(ids[counted], some)
            ids, rows = ids[~counted], rows[~counted]
        self._keep(Records(ids, rows))
        self._rows.spill()

    def drop(self, buckets: Mask) -> int:
        """Forgets all of buckets, which a mask [4096] names: they moved elsewhere. Returns how many rows went."""
        before = self.num_rows
        self._discard(self.list_ids(buckets=buckets, since=-1))
        self._evicted.drop(buckets)
        return before - self.num_rows

    def remove(self, ids: Longs) -> int:
        """Evicts rows, as another shard has done. Adds one to ``version``, if there are any; returns how many."""
        before, ids = self.num_rows, ids[self._has(ids)]
        if ids.size:
            self.version += 1
            self._discard(ids)
            self._evicted.add(ids, self.version)
        return before - self.num_rows

    def evict(self, now: float) -> int:
        """Evicts rows that ``growth`` says are too old. Adds one to ``version``, if there are any.

        A row whose last push is not known, since it came from a checkpoint, is as if it had been pushed now.

        Args:
            now: Seconds since 1970.

        Returns:
            How many.
        """
        seconds = self.growth.evict_after_seconds
        if seconds is None:
            return 0
        if self._rows.date(int(now), self.version + 1):
            self.version += 1
        old = self._rows.find_older(now, seconds)
        counted = self._admission.forget_older(now, seconds) if self._admission else old[:0]
        if old.size or counted.size:
            self.version += 1
            self._evicted.add(counted, self.version)
            self._evict(old)
        return int(old.size)

    def evicted(self, *, since: int = 0) -> Longs:
        """Lists ids that were evicted, or are no longer counted, after a version, and did not come back."""
        return self._evicted.list_since(since)

    def forget_evicted(self, before_version: int) -> None:
        """Forgets which ids were evicted before a version."""
        self._evicted.forget(before_version)
        self.evictions_since = max(self.evictions_since, before_version)

    def put_rows(self, ids: Longs, weight: Floats, state: Mapping[str, Floats]) -> None:
        """Writes rows of a checkpoint. Adds one to ``version``.

        Args:
            ids: [n], each once.
            weight: [n, dim].
            state: Of the optimizer by name, see ``state_columns``: [n, dim], or [n] where it is one number per row;
                0, if it is not given.
        """
        check_ids(self.config, ids)
        self.version += 1
        self._keep(self._make_records(ids, weight, state, self.growth.admit_after, 0, self.version))
        self._rows.spill()

    def read_rows(self, ids: Longs) -> tuple[Floats, dict[str, Floats]]:
        """Reads rows and states by name, as ``put_rows`` takes them; rows that do not exist read as they are born."""
        check_ids(self.config, ids)
        there, records = self._rows.read(ids)
        rows = np.zeros((ids.size, self.record_width), np.float32)
        rows[there] = records
        rows[~there, : self.config.dim] = self._births.draw(ids[~there])
        return self._columns.split(rows)

    def close(self) -> None:
        """Closes the files of rows on disk."""
        self._rows.close()

    def _pull_missing(self, ids: Longs, places: Longs, out: Values) -> None:
        spilled, rows = self._rows.read_spilled(ids[places])
        unborn = places[~spilled]
        with np.errstate(over="ignore"):  # what is too large for float16 becomes infinite, as with rows in memory
            out[places[spilled]] = rows[:, : self.config.dim]
            out[unborn] = self._births.draw(ids[unborn])

    def _open_rows(self, ids: Longs, seen: int) -> tuple[Longs, Mask | None]:
        # Slots of rows, born if need be; and of which of the ids, where some are not admitted.
        slots = self._rows.find(ids)
        absent = np.flatnonzero(slots < 0)
        if not absent.size:
            return slots, None
        born, counts = absent, np.zeros(absent.size, np.uint32)
        self._evicted.remove(ids[absent])
        if self._admission is not None:
            admitted, counts = self._admission.admit(ids[absent], self.version, seen)
            born, counts = absent[admitted], counts[admitted] - np.uint32(1)
            self._evicted.add(self._admission.forget_most(), self.version)
        records = self._make_records(ids[born], self._births.draw(ids[born]), {}, counts, seen, self.version)
        slots[born] = self._rows.put_new(*records)
        return (slots, None) if born.size == absent.size else (slots[slots >= 0], slots >= 0)

    def _make_records(
        self,
        ids: Longs,
        weight: Floats,
        state: Mapping[str, Floats],
        counts: Counts | int,
        seen: Counts | int,
        versions: Longs | int,
    ) -> Records:
        rows = np.zeros((ids.size, self.record_width), np.float32)
        self._columns.join(weight, state, rows)
        rows[:, self._rows.memory.words :] = make_meta(counts, seen, versions, ids.size)
        return Records(ids, rows)

    def _keep(self, records: Records) -> None:
        self._rows.put(*records)
        self._evicted.remove(records.ids)
        if self._admission is not None:
            self._admission.counted.remove(records.ids)

    def _discard(self, ids: Longs) -> None:
        self._rows.remove(ids)
        self._evicted.remove(ids)
        if self._admission is not None:
            self._admission.counted.remove(ids)

    def _evict(self, ids: Longs) -> None:
        self._rows.remove(ids)
        self._evicted.add(ids, self.version)
        self.num_evicted += int(ids.size)

    def _has(self, ids: Longs) -> Mask:
        there, _ = self._rows.read(ids)
        if self._admission is not None:
            there |= self._admission.counted.find(ids)[0] >= 0
        return there

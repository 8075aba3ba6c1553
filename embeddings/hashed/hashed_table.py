"""A table whose rows come into being when they are pushed, and which one process holds some of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.births import Births
from embeddings.hashed.growth import Growth
from embeddings.hashed.row_store import RowStore, split_meta
from embeddings.kernels.hashed_row_kernels import Layout, pull_rows, push_rows
from embeddings.local.row_updates import settings_of
from embeddings.row_optimizers import moves_all_rows, state_columns, trust_of
from embeddings.tables import UNBOUNDED, TableConfig

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]
Values = NDArray[np.float32] | NDArray[np.float16]

_NO_COUNTS = np.empty(0, np.int64)
_KEEP_ALL = Growth()


class Records(NamedTuple):
    """Whole rows: whatever belongs to one lies side by side.

    Attributes:
        ids: [n].
        rows: [n, record_width]: weight, optimizer states, one number if these are odd in number, then as bits of four
            numbers: pushes (uint32), time of the last push in seconds (uint32), version of the last change (int64).
    """

    ids: Longs
    rows: Floats


class HashedTable:
    """Rows by id, born at their first push with the values that ``initial_rows`` says. Not safe for several threads.

    Args:
        config: The table. ``num_rows`` bounds ids and costs nothing; ``UNBOUNDED``: any int64 is an id.
        seed: Of rows' first values.
        salt: Of hashes of ids, see ``hash_kernels``.
        growth: When rows come and go.
        spill_folder: Where rows beyond ``growth.max_bytes`` go with ``growth.spill``.

    Attributes:
        version: How many pushes were applied; whoever restores records sets it.

    Raises:
        ValueError: When rows of such a table cannot be updated one by one.
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
        _check(config)
        self.config, self.growth = config, growth
        self.version = 0
        self._births = Births(config, seed=seed)
        self._states = {name: config.dim if whole else 1 for name, whole in state_columns(config.optimizer).items()}
        first, second, last = [*self._states.values(), 0, 0, 0][:3]
        self._layout = Layout(config.dim, first, second, last)
        self._rows = RowStore(config.dim + sum(self._states.values()), salt=salt)
        self.record_width = self._rows.record_width

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of rows, their states and the map of ids."""
        return self._rows.num_bytes

    def pull(self, ids: Longs, out: Values) -> None:
        """Reads rows and changes nothing; those that do not exist read as they would be born.

        Args:
            ids: [n], in any order.
            out: [n, dim] of float32 or float16, contiguous; written.

        Raises:
            ValueError: When an id is outside the table.
        """
        self._check_ids(ids)
        missing = np.empty(ids.size, np.int64)
        flat = _as_integers(out).reshape(-1)
        rows = self._rows
        count = pull_rows(rows.entries, rows.blocks, rows.stride, rows.salt, ids, self.config.dim, flat, missing)
        if count:
            places = missing[:count]
            out[places] = self._births.draw(ids[places])

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
        """Updates rows; those that do not exist are born first. Adds one to ``version``.

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
        self._check_push(ids, gradients)
        self.version += 1
        slots = self._admit(ids)
        settings = settings_of(self.config, updates, factor, eps_factor)
        flat = _as_integers(gradients).reshape(-1)
        rows = self._rows
        push_rows(rows.blocks, rows.stride, slots, flat, counts, self._layout, settings, self.version, int(now))

    def count_change(self) -> None:
        """Adds one to ``version``, as a push without rows does."""
        self.version += 1

    def take(self, *, buckets: Mask | None = None, since: int = 0) -> Records:
        """Copies rows that changed after a version: of all buckets, or of those that a mask [4096] names."""
        slots = self._rows.list_slots(since=since, buckets=buckets)
        return Records(self._rows.ids_of(slots), self._rows.read(slots))

    def put(self, records: Records, *, version: int | None = None) -> None:
        """Writes records over rows, or beside them, as they are.

        Args:
            records: Of a table with the same configuration.
            version: Replaces theirs, which are another table's where rows moved here from another shard: the next
                ``take(since=...)`` here would miss them.
        """
        ids, rows = records
        if rows.shape != (ids.size, self.record_width):
            expected = (ids.size, self.record_width)
            raise ValueError(f"table {self.config.name!r}: expected records {expected}, got {rows.shape}")
        slots, _ = self._rows.insert(ids)
        if version is not None:
            rows = rows.copy()
            split_meta(rows)[2][:] = version
        self._rows.write(slots, rows)

    def drop(self, buckets: Mask) -> int:
        """Forgets all rows of buckets, which a mask [4096] names: they moved elsewhere. Returns how many."""
        return self._rows.remove(self._rows.ids_of(self._rows.list_slots(buckets=buckets)))

    def remove(self, ids: Longs) -> int:
        """Forgets rows, which another shard has evicted. Returns how many."""
        return self._rows.remove(ids)

    def evict(self, now: float) -> int:
        """Evicts rows as ``growth`` says. Returns how many."""
        return 0

    def evicted(self, *, since: int = 0) -> Longs:
        """Lists ids that were evicted after a version, and not born again."""
        return np.empty(0, np.int64)

    def forget_evicted(self, before_version: int) -> None:
        """Forgets which ids were evicted before a version."""

    def put_rows(self, ids: Longs, weight: Floats, state: Mapping[str, Floats]) -> None:
        """Writes rows of a checkpoint. Adds one to ``version``.

        Args:
            ids: [n], each once.
            weight: [n, dim].
            state: Of the optimizer by name, see ``state_columns``: [n, dim], or [n] where it is one number per row.
        """
        self._check_ids(ids)
        self.version += 1
        rows = np.zeros((ids.size, self.record_width), np.float32)
        at = 0
        for columns, values in zip(self._columns(), [weight, *(state[name] for name in self._states)], strict=True):
            rows[:, at : at + columns] = values.reshape(ids.size, columns)
            at += columns
        pushes, _, versions = split_meta(rows)
        pushes[:], versions[:] = self.growth.admit_after, self.version
        self.put(Records(ids, rows))

    def read_rows(self, ids: Longs) -> tuple[Floats, dict[str, Floats]]:
        """Reads rows and states by name, as ``put_rows`` takes them; rows that do not exist read as they are born."""
        slots, missing = self._rows.find(ids)
        rows = np.zeros((ids.size, self._rows.words), np.float32)
        there = slots >= 0
        rows[there] = self._rows.read(slots[there], 0, self._rows.words)
        if missing:
            rows[~there, : self.config.dim] = self._births.draw(ids[~there])
        edges = np.cumsum([0, *self._columns()])
        parts = [rows[:, first:last].copy() for first, last in itertools.pairwise(edges)]
        states = dict(zip(self._states, parts[1:], strict=True))
        return parts[0], {name: s if self._states[name] > 1 else s[:, 0] for name, s in states.items()}

    def _columns(self) -> list[int]:
        return [self.config.dim, *self._states.values()]

    def _admit(self, ids: Longs) -> Longs:
        slots, missing = self._rows.find(ids)
        if missing:
            born = ids[slots < 0]
            its, _ = self._rows.insert(born)
            self._rows.write(its, self._births.draw(born))
            slots[slots < 0] = its
        return slots

    def _check_push(self, ids: Longs, gradients: Values) -> None:
        self._check_ids(ids)
        name = self.config.name
        if gradients.shape != (ids.size, self.config.dim):
            expected = (ids.size, self.config.dim)
            raise ValueError(f"table {name!r}: expected gradients {expected}, got {gradients.shape}")
        if ids.size > 1 and not (ids[1:] > ids[:-1]).all():
            ordered = np.sort(ids)
            repeated = ordered[1:][ordered[1:] == ordered[:-1]]
            if repeated.size:
                raise ValueError(f"table {name!r}: expected each id once in a push, got {repeated[0]} again")

    def _check_ids(self, ids: Longs) -> None:
        limit = self.config.num_rows
        if limit == UNBOUNDED or not ids.size:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise ValueError(f"table {self.config.name!r}: expected ids in [0, {limit}), got {wrong}")


def _as_integers(values: Values) -> NDArray[Any]:
    # Numba does not know float16.
    return values.view(np.int16) if values.dtype == np.float16 else values


def _check(config: TableConfig) -> None:
    name = config.name
    if config.row_type != "fp32":
        raise ValueError(f"table {name!r}: expected row_type 'fp32' for rows on demand, got {config.row_type!r}")
    if moves_all_rows(config.optimizer) or trust_of(config.optimizer) != "row":
        raise ValueError(
            f"table {name!r}: expected an optimizer that updates rows one by one, such as RowLamb(trust='row') or "
            f"RowCowClip(l2_mode='lazy'), got {config.optimizer}"
        )

"""What stands where in a table's records, and how records and named states become one another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hashed_row_kernels import Layout
from embeddings.kernels.record_kernels import META_WORDS, VERSION
from embeddings.row_optimizers import state_columns
from embeddings.tables import TableConfig

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Counts = NDArray[np.uint32]


class Meta(NamedTuple):
    """What ends each record: live, where the records are contiguous.

    Attributes:
        counts: [n]: pushes.
        seen: [n]: time of the last push, in seconds; 0: not known.
        versions: [n]: of the last change.
    """

    counts: Counts
    seen: Counts
    versions: Longs


class Records(NamedTuple):
    """Whole rows: whatever belongs to one lies side by side.

    Attributes:
        ids: [n].
        rows: [n, record_width]: weight; optimizer states; one number if these are odd in number; then, as bits of four
            numbers, pushes (uint32), time of the last push in seconds (uint32) and version of the last change (int64).
            With the first bit of the pushes set it is no row yet, but counted until it is admitted; weight and states
            are those it would be born with.
    """

    ids: Longs
    rows: Floats


class Columns:
    """A table's columns: its row, then its states.

    Args:
        config: The table.

    Attributes:
        layout: As kernels know it.
        words: Of a record, but for its ``Meta``.
    """

    def __init__(self, config: TableConfig) -> None:
        self._whole = state_columns(config.optimizer)
        self._states = {name: config.dim if whole else 1 for name, whole in self._whole.items()}
        self._sizes = [config.dim, *self._states.values()]
        first, second, last = [*self._states.values(), 0, 0, 0][:3]
        self.layout = Layout(config.dim, first, second, last)
        self.words = sum(self._sizes)

    def join(self, weight: Floats, state: Mapping[str, Floats], rows: Floats) -> None:
        """Writes a row's numbers into records [n, >= words]; a state that is not given is left as it is."""
        parts = [weight, *(state.get(name) for name in self._states)]
        for part, (first, last) in zip(parts, self._edges(), strict=True):
            if part is not None:
                rows[:, first:last] = part.reshape(len(rows), last - first)

    def split(self, rows: Floats) -> tuple[Floats, dict[str, Floats]]:
        """Copies rows [n, dim] and states, [n, dim] or [n], out of records [n, >= words]."""
        weight, *states = [rows[:, first:last].copy() for first, last in self._edges()]
        named = zip(self._states, states, strict=True)
        return weight, {name: state if self._whole[name] else state[:, 0] for name, state in named}

    def _edges(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(itertools.accumulate(self._sizes, initial=0)))


def join_records(parts: Sequence[Records]) -> Records:
    """Makes one of several, of which there is at least one."""
    full = [part for part in parts if part.ids.size] or parts[:1]
    if len(full) == 1:
        return full[0]
    return Records(np.concatenate([part.ids for part in full]), np.concatenate([part.rows for part in full]))


def meta_of(rows: Floats) -> Meta:
    """Gives what ends records [n, >= 4], which must be contiguous."""
    meta = rows[:, -META_WORDS:]
    words = meta.view(np.uint32)
    return Meta(words[:, 0], words[:, 1], meta[:, VERSION:].view(np.int64)[:, 0])


def make_meta(counts: Counts | int, seen: Counts | int, versions: Longs | int, n: int) -> Floats:
    """Makes ends of records: [n, 4]."""
    rows = np.empty((n, META_WORDS), np.float32)
    meta = meta_of(rows)
    meta.counts[:], meta.seen[:], meta.versions[:] = counts, seen, versions
    return rows

"""A batch over rows that are not here: each row is asked for once, looked up where it was put, and updated once.

The arithmetic is that of ``LocalRows``, by the same kernels: bags are pooled from the rows as they came, and the
gradients of a row are summed in batch order over all features of its table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.kernels import grouping_kernels, lookup_kernels, unique_kernels
from embeddings.kernels.threads import count_parts, run_all
from embeddings.local.local_rows import Bags

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_NO_STATE = np.empty((0, 1), np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class UniqueRows:
    """Which rows of which table a batch is about.

    Attributes:
        ids: Of each table: the different ids of the batch, ascending: [n] int64.
        bags: The batch, with tables as PART; its ids are places in ``ids`` of their table.
        means: Of each table, whether it takes the mean.
    """

    ids: list[Longs]
    bags: Bags
    means: tuple[bool, ...]

    def look_up(self, rows: Sequence[Floats], out: Tensor) -> None:
        """Pools the bags into ``out``.

        Args:
            rows: Of each table [n, dim], in the order of ``ids``.
            out: Flat float32, contiguous; only the places of the bags are written.
        """
        numbers, offsets, weights = self.bags.arrays()
        pooled = out.view(-1).numpy()
        calls: list[partial[int]] = []
        mine, shares = self.bags.segments_of(len(self.ids)), count_parts(self.bags.count_ids(len(self.ids)))
        for segments, its_rows, mean, parts in zip(mine, rows, self.means, shares, strict=True):
            cells = sum(segments[:, 2].tolist())
            for first, last in itertools.pairwise(cells * share // parts for share in range(parts + 1)):
                arguments = (its_rows, numbers, offsets, weights, segments, first, last, mean, pooled)
                calls.append(partial(lookup_kernels.look_up, *arguments))
        run_all(calls)

    def sum_gradients(self, gradient: Tensor, dims: Sequence[int]) -> list[Floats]:
        """Sums the gradients of each row, in batch order.

        Args:
            gradient: Flat float32, contiguous: of what ``look_up`` wrote.
            dims: Of the tables.

        Returns:
            Of each table [n, dim], in the order of ``ids``.
        """
        source, arrays = gradient.reshape(-1).numpy(), self.bags.arrays()
        mine = self.bags.segments_of(len(self.ids))
        return run_all(
            [
                partial(_sum_gradients, arrays, segments, mean, source, np.empty((ids.size, dim), np.float32))
                for segments, mean, ids, dim in zip(mine, self.means, self.ids, dims, strict=True)
            ]
        )

    def count_ids(self, table: int) -> NDArray[np.uint32]:
        """Says how often each of the ``ids`` of a table occurs: [n]."""
        numbers, offsets, _ = self.bags.arrays()
        counts = np.zeros(self.ids[table].size, np.uint32)
        for _, first, cells, *_ in self.bags.segments_of(len(self.ids))[table].tolist():
            some = numbers[offsets[first] : offsets[first + cells]]
            counts += np.bincount(some, minlength=counts.size).astype(np.uint32)
        return counts


def find_unique_rows(bags: Bags, means: Sequence[bool]) -> UniqueRows:
    """Finds the different ids of each table.

    Args:
        bags: What to look up, with tables as PART; ids may be any 64-bit numbers.
        means: Of each table, whether it takes the mean.
    """
    ids, offsets, _ = bags.arrays()
    numbers = np.zeros(ids.size, np.int64)
    found = run_all(
        [partial(_find_unique, ids, offsets, segments, numbers) for segments in bags.segments_of(len(means))]
    )
    return UniqueRows(ids=found, bags=replace(bags, ids=torch.from_numpy(numbers)), means=tuple(means))


def _find_unique(ids: NDArray[np.int64], offsets: Longs, segments: Longs, numbers: Longs) -> Longs:
    found: Longs = unique_kernels.number_ids(ids, offsets, segments, numbers)
    order = np.argsort(found)
    unique_kernels.reorder_numbers(offsets, segments, order, numbers)
    return found[order]


def _sum_gradients(
    arrays: tuple[Longs, Longs, Floats], segments: Longs, mean: bool, source: Floats, sums: Floats
) -> Floats:
    keys, places, scales = grouping_kernels.group_by_row(*arrays, segments, mean, max(1, len(sums)), 0, 1)
    rows = np.empty(len(sums), np.uint64)
    # What is asked for ahead are the rows that are written: those that were looked up are not needed again.
    grouping_kernels.sum_gradients(keys, 0, places, scales, source, sums, _NO_STATE, _NO_STATE, rows, sums)
    return sums

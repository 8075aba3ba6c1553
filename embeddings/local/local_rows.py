"""The rows that this process holds: rectangles of tables, looked up and updated by our own kernels on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.kernels import fused_kernels, grouping_kernels, lookup_kernels
from embeddings.kernels.sixteen_bit_kernels import Rounding
from embeddings.kernels.threads import count_parts, run_all
from embeddings.kernels.update_kernels import IDS, MEASURES, UpdateSettings
from embeddings.local.held_part import HeldPart, RowsPart, whole_table
from embeddings.local.row_updates import row_update
from embeddings.local.staged_updates import StagedRows, WholeSums, run_stages
from embeddings.row_optimizers import RowOptimizer

__all__ = ["Bags", "LocalRows", "RowsPart", "WholeSums", "rounds_needed", "whole_table"]

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Keys = NDArray[np.uint64]
Arrays = tuple[NDArray[Any], Longs, Floats]  # ids, offsets, weights
Cells = tuple[Arrays, Longs]  # and the segments of one part
Told = tuple[UpdateSettings, Rounding]

_NO_WEIGHTS = np.empty(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Bags ("cells") to look up, and where their vectors lie in a flat float32 tensor.

    Cell ``c`` holds ``ids[offsets[c] : offsets[c + 1]]``. A segment is a run of cells of one part, whose vectors lie
    at equal distances: that of its cell ``FIRST + i`` begins at ``START + i * STRIDE`` and is as long as the part has
    columns. A part may have any number of segments, and cells that no segment names are left alone.

    Attributes:
        ids: [num_ids], int32 or int64, contiguous; relative to the part's first row.
        offsets: [cells + 1] int64; it ascends, and no id lies outside.
        weights: [num_ids] float32: what each id's vector is multiplied by; None: 1.
        segments: [k, 5]: PART, FIRST cell, COUNT of cells, START, STRIDE; sorted by PART. Gradients of a row are
            summed in this order.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor | None
    segments: NDArray[np.int64]

    def arrays(self) -> Arrays:
        """Gives ids, offsets and weights as kernels take them: no weights where all are 1."""
        weights = _NO_WEIGHTS if self.weights is None else self.weights.numpy()
        return self.ids.numpy(), self.offsets.numpy(), weights

    def segments_of(self, parts: int) -> list[Longs]:
        """Gives the segments of each part."""
        edges = np.searchsorted(self.segments[:, 0], np.arange(parts + 1))
        return [self.segments[first:last] for first, last in itertools.pairwise(edges.tolist())]

    def count_ids(self, parts: int) -> list[int]:
        """Counts the ids of each part."""
        # All at once: numpy takes as long to add up one part's as all parts'.
        offsets, (part, first, count) = self.offsets.numpy(), self.segments[:, :3].T
        ids = offsets[first + count] - offsets[first]
        counts: list[int] = np.bincount(part, ids, parts).astype(np.int64).tolist()
        return counts


def rounds_needed(optimizer: RowOptimizer) -> int:
    """Says how many exchanges of sums a row optimizer takes for one update of a table that is split.

    Over columns: row-wise Adagrad's mean of g ** 2, partial LAMB's as well, and LAMB's and CowClip's norms of a row.
    Where LAMB's ratio is that of many rows, its norms are summed over the table, however it is split.
    """
    return len(row_update(optimizer).measures)


class LocalRows:
    """Rectangles of tables: each touched row is updated once, with the sum of its gradients.

    The result is bit for bit the same for any number of threads.

    Args:
        parts: The rectangles.
        seed: Rows start as those of the whole table would, see ``build_tables``.

    Raises:
        ValueError: When a part has more than 2**32 rows.
    """

    def __init__(self, parts: Sequence[RowsPart], *, seed: int = 0) -> None:
        self.parts = tuple(parts)
        self._held = [HeldPart(part, seed=seed) for part in self.parts]
        self._factors = (1.0,) * len(self.parts)
        self._eps_factor = 1.0
        self._moved_unasked = [held.part.num_rows if held.moves_all_rows else 0 for held in self._held]

    def look_up(self, bags: Bags, out: Tensor) -> int:
        """Pools bags into their places in ``out``, as their table's configuration says; an empty bag gives zeros.

        Args:
            bags: What to look up.
            out: Flat float32, contiguous; only the places of the bags are written.

        Returns:
            -1, or the place in ``bags.ids`` of the first id outside its part.
        """
        ids, offsets, weights = bags.arrays()
        pooled = out.view(-1).numpy()
        mine = bags.segments_of(len(self.parts))
        calls: list[partial[int]] = []
        for part, parts in enumerate(count_parts(bags.count_ids(len(self.parts)))):
            segments = mine[part]
            if not segments.size:
                continue
            held, cells = self._held[part], sum(segments[:, 2].tolist())
            for first, last in itertools.pairwise(cells * share // parts for share in range(parts + 1)):
                arguments = (held.stored(), ids, offsets, weights, segments, first, last, held.mean, pooled)
                calls.append(partial(lookup_kernels.look_up, *arguments))
        wrong = [at for at in run_all(calls) if at >= 0]
        return min(wrong, default=-1)

    def update(self, bags: Bags, gradient: Tensor, whole: WholeSums | None = None) -> None:
        """Updates each row that the bags touch once, with the sum of its gradients. Counts as an update of every part.

        Where the optimizer moves all rows, others are updated with a gradient of 0. Replicated parts are left alone.

        Args:
            bags: What was looked up; all ids lie inside.
            gradient: Flat float32, contiguous: of what ``look_up`` wrote.
            whole: For parts of split tables whose optimizers need sums over all of the row or of the table.
        """
        source = gradient.reshape(-1).numpy()
        arrays, mine = bags.arrays(), bags.segments_of(len(self.parts))
        work = np.add(bags.count_ids(len(self.parts)), self._moved_unasked).tolist()
        fused, staged = [], []
        for part, parts in enumerate(count_parts(work)):
            if self.parts[part].is_replicated:
                continue
            told = self._held[part].count_update(self._factors[part], self._eps_factor)
            if self._held[part].is_staged:
                staged.append(partial(self._begin_staged, part, told, (arrays, mine[part]), source))
            elif mine[part].size or self._held[part].moves_all_rows:
                where = (part, told, (arrays, mine[part]), source)
                fused += [partial(self._update_share, *where, share, parts) for share in range(parts)]
        run_all(fused)
        run_stages(run_all(staged), whole)

    def sum_gradients(self, part: int, bags: Bags, gradient: Tensor, out: Tensor) -> None:
        """Adds the gradients of a replicated part's rows into ``out``, and updates nothing.

        Args:
            part: The replicated part.
            bags: What was looked up; segments of other parts are left alone.
            gradient: Flat float32, contiguous.
            out: [num_rows, num_columns + 1] float32, added to; the last column counts the row's ids.
        """
        self._check_replicated(part)
        segments, source, sums = bags.segments_of(len(self.parts))[part], gradient.reshape(-1).numpy(), out.numpy()
        if segments.size:
            add = partial(grouping_kernels.add_gradients, *bags.arrays(), segments, self._held[part].mean, source, sums)
            shares = torch.get_num_threads()
            run_all([partial(add, share, shares) for share in range(shares)])

    def apply(self, part: int, sums: Tensor) -> None:
        """Updates the rows of a replicated part that any rank touched, or all. Counts as one update of the part.

        Args:
            part: The replicated part.
            sums: [num_rows, num_columns + 1] float32, what ``sum_gradients`` gave, summed over ranks.
        """
        self._check_replicated(part)
        held = self._held[part]
        told = held.count_update(self._factors[part], self._eps_factor)
        counts = sums[:, -1].numpy()
        rows = np.arange(counts.size) if held.moves_all_rows else counts.nonzero()[0]
        measured = np.empty((rows.size, MEASURES))
        measured[:, IDS] = np.maximum(counts[rows], 1)
        # A copy, since stages write into it.
        copied = np.ascontiguousarray(sums.numpy()[rows, :-1])
        run_stages([StagedRows(part, held, told, rows.astype(np.uint64), copied, measured)], None)

    def rows(self) -> Iterator[TableRows]:
        """Gives each part's live rows and their optimizer's state."""
        for held in self._held:
            part = held.part
            yield TableRows(part.config, held.weight, held.state, part.first_row, part.first_column)

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """Multiplies each part's own ``learning_rate`` by its factor from the next update on."""
        self._factors = tuple(factors)

    def set_eps_factor(self, factor: float) -> None:
        """Multiplies each part's own ``eps`` from the next update on."""
        self._eps_factor = factor

    def _update_share(self, part: int, told: Told, cells: Cells, source: Floats, share: int, shares: int) -> None:
        held = self._held[part]
        arguments = (held.stored(), *_group(held, cells, share, shares), source, *held.states(), *told)
        if held.moves_all_rows:
            fused_kernels.update_all_rows(*arguments, share, shares)
        else:
            fused_kernels.update_rows(*arguments)

    def _begin_staged(self, part: int, told: Told, cells: Cells, source: Floats) -> StagedRows:
        held = self._held[part]
        keys, places, scales = _group(held, cells, 0, 1)
        number = held.part.num_rows if held.moves_all_rows else grouping_kernels.count_rows(keys)
        rows, measured = np.empty(number, np.uint64), np.empty((number, MEASURES))
        sums, counts = np.empty((number, held.part.num_columns), np.float32), measured[:, IDS]
        if held.moves_all_rows:
            grouping_kernels.sum_all_gradients(keys, 0, places, scales, source, 0, 1, number, rows, sums, counts)
        else:
            first, second, _ = held.states()
            grouping_kernels.sum_gradients(keys, 0, places, scales, source, held.stored(), first, second, rows, sums)
            grouping_kernels.count_ids(keys, 0, keys.size, counts)
        return StagedRows(part, held, told, rows, sums, measured)

    def _check_replicated(self, part: int) -> None:
        if not self.parts[part].is_replicated:
            name = self.parts[part].config.name
            raise ValueError(f"table {name!r}: expected a part with is_replicated=True, got one that update() updates")


def _group(held: HeldPart, cells: Cells, share: int, shares: int) -> tuple[Keys, Longs, Floats]:
    arrays, segments = cells
    keys, places, scales = grouping_kernels.group_by_row(
        *arrays, segments, held.mean, held.part.num_rows, share, shares
    )
    return keys, places, scales

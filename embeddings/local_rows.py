"""The rows that this process holds: rectangles of tables, looked up and updated by our own kernels on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings import grouping_kernels, lookup_kernels
from embeddings.initial_rows import initial_rows
from embeddings.interface import TableRows
from embeddings.row_optimizers import RowLamb, RowOptimizer
from embeddings.row_updates import RowUpdate, make_state, row_update, settings_of
from embeddings.staged_updates import StagedRows, WholeSums, run_stages
from embeddings.tables import TableConfig
from embeddings.threads import count_parts, run_all
from embeddings.update_kernels import MEASURES, UpdateSettings

__all__ = ["Bags", "LocalRows", "RowsPart", "WholeSums", "rounds_needed", "whole_table"]

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Keys = NDArray[np.uint64]
Arrays = tuple[NDArray[Any], Longs, Floats]  # ids, offsets, weights

_NO_WEIGHTS = np.empty(0, np.float32)
_NO_STATE = np.empty((0, 1), np.float32)


class RowsPart(NamedTuple):
    """A rectangle of a table: rows [first_row, first_row + num_rows) of some columns, held by this process."""

    config: TableConfig
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    is_replicated: bool = False  # the whole table, which every rank holds: ``apply`` updates it instead of ``update``


def whole_table(config: TableConfig) -> RowsPart:
    """Gives the rectangle that is all of a table."""
    return RowsPart(config, 0, config.num_rows, 0, config.dim)


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


def rounds_needed(optimizer: RowOptimizer) -> int:
    """Says how many exchanges of sums a row optimizer takes for one update of a table that is split.

    Over columns: row-wise Adagrad's mean of g ** 2, partial LAMB's as well, and LAMB's norms of a row. Where LAMB's
    ratio is that of all touched rows, its norms are summed over the table, however it is split.
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
        self._weights: list[Tensor] = []
        self._states: list[dict[str, Tensor]] = []
        self._updates: list[RowUpdate] = []
        self._learning_rate_factor = 1.0
        for config, first_row, num_rows, first_column, num_columns, _ in self.parts:
            if num_rows > 1 << 32:
                raise ValueError(f"table {config.name!r}: expected num_rows <= 2**32, got {num_rows}")
            rectangle = {"first_row": first_row, "num_rows": num_rows}
            rectangle |= {"first_column": first_column, "num_columns": num_columns}
            self._weights.append(initial_rows(config, seed=seed, **rectangle))
            self._states.append(make_state(config, num_rows, num_columns))
            self._updates.append(row_update(config.optimizer))

    def look_up(self, bags: Bags, out: Tensor) -> int:
        """Pools bags into their places in ``out``, as their table's configuration says; an empty bag gives zeros.

        Args:
            bags: What to look up.
            out: Flat float32, contiguous; only the places of the bags are written.

        Returns:
            -1, or the place in ``bags.ids`` of the first id outside its part.
        """
        ids, offsets, weights = _arrays(bags)
        pooled = out.view(-1).numpy()
        mine = self._segments_of(bags)
        calls: list[partial[int]] = []
        for part, parts in enumerate(count_parts(_count_ids(mine, offsets))):
            segments = mine[part]
            if not segments.size:
                continue
            weight, mean = self._weights[part].numpy(), self.parts[part].config.pooling == "mean"
            cells = int(segments[:, 2].sum())
            for first, last in itertools.pairwise(cells * share // parts for share in range(parts + 1)):
                arguments = (weight, ids, offsets, weights, segments, first, last, mean, pooled)
                calls.append(partial(lookup_kernels.look_up, *arguments))
        wrong = [at for at in run_all(calls) if at >= 0]
        return min(wrong, default=-1)

    def update(self, bags: Bags, gradient: Tensor, whole: WholeSums | None = None) -> None:
        """Updates each row that the bags touch once, with the sum of its gradients. Counts as an update of every part.

        Replicated parts are left alone.

        Args:
            bags: What was looked up; all ids lie inside.
            gradient: Flat float32, contiguous: of what ``look_up`` wrote.
            whole: For parts of split tables whose optimizers need sums over all of the row or of the table.
        """
        source = gradient.reshape(-1).numpy()
        arrays, mine = _arrays(bags), self._segments_of(bags)
        fused, staged = [], []
        settings = [self._count_update(part) for part in range(len(self.parts))]
        for part, parts in enumerate(count_parts(_count_ids(mine, arrays[1]))):
            where = (part, settings[part], arrays, mine[part], source)
            if self._is_staged(part):
                staged.append(partial(self._sum_all, *where))
            elif mine[part].size:
                fused += [partial(self._update_some, *where, share, parts) for share in range(parts)]
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
        (ids, offsets, weights), segments = _arrays(bags), self._segments_of(bags)[part]
        mean, source, sums = self.parts[part].config.pooling == "mean", gradient.reshape(-1).numpy(), out.numpy()
        parts = torch.get_num_threads() if segments.size else 0
        run_all(
            [
                partial(
                    grouping_kernels.add_gradients, ids, offsets, weights, segments, mean, source, share, parts, sums
                )
                for share in range(parts)
            ]
        )

    def apply(self, part: int, rows: Tensor, sums: Tensor) -> None:
        """Updates rows of a replicated part with their summed gradients. Counts as one update of the part.

        Args:
            part: The replicated part.
            rows: [n] int64, ascending, each once.
            sums: [n, columns] float32.
        """
        self._check_replicated(part)
        touched = rows.numpy().astype(np.uint64)
        # A copy, since stages write into it.
        run_stages([self._begin(part, self._count_update(part), touched, np.array(sums.numpy(), order="C"))], None)

    def rows(self) -> Iterator[TableRows]:
        """Gives each part's live rows and their optimizer's state."""
        for part, weight, state in zip(self.parts, self._weights, self._states, strict=True):
            yield TableRows(part.config, weight, state, part.first_row, part.first_column)

    def set_learning_rate_factor(self, factor: float) -> None:
        """Multiplies every table's own ``learning_rate`` by ``factor`` from the next update on."""
        self._learning_rate_factor = factor

    def _segments_of(self, bags: Bags) -> list[NDArray[np.int64]]:
        edges = np.searchsorted(bags.segments[:, 0], np.arange(len(self.parts) + 1))
        return [bags.segments[first:last] for first, last in itertools.pairwise(edges.tolist())]

    def _count_update(self, part: int) -> UpdateSettings:
        return settings_of(self.parts[part].config, self._states[part], self._learning_rate_factor)

    def _is_staged(self, part: int) -> bool:
        return bool(self._updates[part].measures) and (
            self.parts[part].num_columns < self.parts[part].config.dim or self._trust(part) == "touched"
        )

    def _trust(self, part: int) -> Literal["row", "touched"]:
        optimizer = self.parts[part].config.optimizer
        return optimizer.trust if isinstance(optimizer, RowLamb) else "row"

    def _state_arrays(self, part: int) -> tuple[Floats, Floats]:
        state = self._states[part]
        first, second = [state[name].view(len(state[name]), -1).numpy() for name in self._updates[part].states] + [
            _NO_STATE
        ] * (2 - len(self._updates[part].states))
        return first, second

    def _group(self, part: int, arrays: Arrays, segments: Longs, share: int, parts: int) -> tuple[Keys, Longs, Floats]:
        mean = self.parts[part].config.pooling == "mean"
        keys, places, scales = grouping_kernels.group_by_row(
            *arrays, segments, mean, self.parts[part].num_rows, share, parts
        )
        return keys, places, scales

    def _update_some(
        self,
        part: int,
        settings: UpdateSettings,
        arrays: Arrays,
        segments: Longs,
        source: Floats,
        share: int,
        parts: int,
    ) -> None:
        grouped = self._group(part, arrays, segments, share, parts)
        weight, states = self._weights[part].numpy(), self._state_arrays(part)
        self._updates[part].fused(weight, *grouped, source, *states, settings)

    def _sum_all(
        self, part: int, settings: UpdateSettings, arrays: Arrays, segments: Longs, source: Floats
    ) -> StagedRows:
        keys, places, scales = self._group(part, arrays, segments, 0, 1)
        rows = np.empty(grouping_kernels.count_rows(keys), np.uint64)
        sums = np.empty((rows.size, self.parts[part].num_columns), np.float32)
        grouping_kernels.sum_gradients(keys, 0, places, scales, source, self._weights[part].numpy(), rows, sums)
        return self._begin(part, settings, rows, sums)

    def _begin(self, part: int, settings: UpdateSettings, rows: Keys, sums: Floats) -> StagedRows:
        held = self.parts[part]
        first, second = self._state_arrays(part)
        return StagedRows(
            part=part,
            update=self._updates[part],
            settings=settings,
            rows=rows,
            held=self._weights[part].numpy(),
            at=rows,
            sums=sums,
            first=first,
            second=second,
            measured=np.empty((rows.size, MEASURES)),
            last_measure_over=self._trust(part),
            has_all_columns=held.num_columns == held.config.dim,
            has_whole_table=(held.num_rows, held.num_columns) == (held.config.num_rows, held.config.dim),
        )

    def _check_replicated(self, part: int) -> None:
        if not self.parts[part].is_replicated:
            name = self.parts[part].config.name
            raise ValueError(f"table {name!r}: expected a part with is_replicated=True, got one that update() updates")


def _arrays(bags: Bags) -> Arrays:
    weights = _NO_WEIGHTS if bags.weights is None else bags.weights.numpy()
    return bags.ids.numpy(), bags.offsets.numpy(), weights


def _count_ids(segments: Sequence[Longs], offsets: Longs) -> list[int]:
    return [int((offsets[mine[:, 1] + mine[:, 2]] - offsets[mine[:, 1]]).sum()) for mine in segments]

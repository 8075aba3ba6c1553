"""Which rank asks which for what: a plan of tables, taken apart into the streams that an exchange consists of.

A *cut* is a feature and a range of its table's rows: the ids of a batch are cut so. A *cell* is what one bag has in one
cut: one or more ids, whose rows are summed where they lie. A *lane* is a cut and a rectangle that holds its rows or
some of their columns: all cells of a cut go down each of its lanes, and a vector per cell comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embeddings.local.local_rows import RowsPart
from embeddings.shards import ShardingPlan, TablePlan
from embeddings.tables import TableConfig

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """The same on every rank. Lanes lie in the order of their owners, there by part, and there by feature.

    Attributes:
        parts: by rank: the rectangles that it holds, without replicated tables, in the order of tables, rows, columns.
            Rectangles of one table either hold the same rows or none in common: where a plan's shards do not line up,
            they are divided.
        tables: by rank: the table of each of these.
        replicated: tables of which every rank holds all.
        feature_cuts: [features + 1]: a feature's cuts are those from ``feature_cuts[f]`` to ``feature_cuts[f + 1]``;
            none where its table is replicated.
        cut_rows: [cuts, 2]: first row, and the one after the last.
        owner, cut, feature, part, column, width: [lanes]: the rank that holds the rows; the cut; its feature; the
            place in ``parts[owner]``; the rectangle's first column and number of columns.
        owners: [ranks + 1]: a rank's lanes are those from ``owners[r]`` to ``owners[r + 1]``.
    """

    parts: tuple[tuple[RowsPart, ...], ...]
    tables: tuple[tuple[int, ...], ...]
    replicated: tuple[int, ...]
    feature_cuts: Longs
    cut_rows: Longs
    owner: Longs
    cut: Longs
    feature: Longs
    part: Longs
    column: Longs
    width: Longs
    owners: Longs

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.parts)


def lay_lanes(configs: Sequence[TableConfig], plan: ShardingPlan) -> Lanes:
    """Takes a plan apart.

    Raises:
        ValueError: When the plan is not one of these tables.
    """
    plan.check(configs)
    parts: list[list[RowsPart]] = [[] for _ in range(plan.ranks)]
    tables: list[list[int]] = [[] for _ in range(plan.ranks)]
    lanes: list[list[tuple[int, ...]]] = [[] for _ in range(plan.ranks)]
    feature_cuts: list[int] = [0]
    cut_rows: list[tuple[int, int]] = []
    for t, (config, table) in enumerate(zip(configs, plan.tables, strict=True)):
        ranges = [] if table.sharding == "replicated" else _row_ranges(config, table)
        first_cut, first_feature = len(cut_rows), len(feature_cuts) - 1
        for _ in config.features:
            cut_rows += ranges
            feature_cuts.append(len(cut_rows))
        for rank, k, part in _divide(config, table, ranges):
            lanes[rank] += [
                (
                    rank,
                    first_cut + f * len(ranges) + k,
                    first_feature + f,
                    len(parts[rank]),
                    part.first_column,
                    part.num_columns,
                )
                for f in range(len(config.features))
            ]
            parts[rank].append(part)
            tables[rank].append(t)
    flat = np.array([lane for of_rank in lanes for lane in of_rank], dtype=np.int64).reshape(-1, 6)
    columns = [np.ascontiguousarray(column) for column in flat.T]
    return Lanes(
        parts=tuple(map(tuple, parts)),
        tables=tuple(map(tuple, tables)),
        replicated=tuple(t for t, table in enumerate(plan.tables) if table.sharding == "replicated"),
        feature_cuts=np.array(feature_cuts, dtype=np.int64),
        cut_rows=np.array(cut_rows, dtype=np.int64).reshape(-1, 2),
        **dict(zip(("owner", "cut", "feature", "part", "column", "width"), columns, strict=True)),
        owners=np.cumsum([0, *map(len, lanes)], dtype=np.int64),
    )


def _row_ranges(config: TableConfig, table: TablePlan) -> list[tuple[int, int]]:
    edges = sorted({shard.first_row for shard in table.shards} | {config.num_rows})
    return list(pairwise(edges))


def _divide(
    config: TableConfig, table: TablePlan, ranges: Sequence[tuple[int, int]]
) -> list[tuple[int, int, RowsPart]]:
    # Parts sum their ids' rows; a bag's mean is taken where the bag is whole.
    summed = replace(config, pooling="sum")
    return [
        (shard.rank, k, RowsPart(summed, first, last - first, shard.first_column, shard.num_columns))
        for k, (first, last) in enumerate(ranges)
        for shard in table.shards
        if shard.first_row <= first < shard.first_row + shard.num_rows
    ]

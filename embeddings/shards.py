"""Which rank holds which part of which table: a plan is a list of rectangles that tile every table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from embeddings.tables import TableConfig

Sharding = Literal["table_wise", "column_wise", "row_wise", "table_row_wise", "grid", "replicated"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)
Exchange = Literal["fp32", "fp16", "bf16"]  # how rows and gradients travel between ranks
EXCHANGE_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Of each number."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rectangle of a table, on one rank: rows [first_row, first_row + num_rows) of some columns."""

    table: str
    rank: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Where one table lies.

    Attributes:
        table: the table's name.
        sharding: what the shards come from; ``replicated`` is the whole table once on every rank, the others tile it.
        shards: in the order of rows, then columns; none of them is empty. Replicated: in the order of ranks.
        why: the reason in one sentence, for who asks the planner.
    """

    table: str
    sharding: Sharding
    shards: tuple[Shard, ...]
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardingPlan:
    """Where all tables lie, in the order of their configurations.

    Attributes:
        ranks: number of processes.
        ranks_per_node: ranks [0, ranks_per_node) share a machine, and so on; what lies between is fast.
        tables: one entry per table.
    """

    ranks: int
    ranks_per_node: int
    tables: tuple[TablePlan, ...]

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1 or self.ranks % self.ranks_per_node:
            raise ValueError(
                f"plan: expected ranks to be a multiple of ranks_per_node, got {self.ranks} and {self.ranks_per_node}"
            )

    def check(self, configs: Sequence[TableConfig]) -> None:
        """Check that the plan is one of these tables, and that its shards tile each of them.

        Raises:
            ValueError: naming the table.
        """
        names = [config.name for config in configs]
        planned = [table.table for table in self.tables]
        if names != planned:
            raise ValueError(f"plan: expected the tables {', '.join(names)}, got {', '.join(planned)}")
        for config, table in zip(configs, self.tables, strict=True):
            _check_tiles(config, table, self.ranks)


def split_evenly(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut [0, total) into (first, count) of ``parts`` pieces whose lengths differ by at most 1; some may be empty."""
    edges = [total * part // parts for part in range(parts + 1)]
    return [(first, last - first) for first, last in pairwise(edges)]


def place(
    config: TableConfig, sharding: Sharding, ranks: Sequence[int], *, ranks_per_node: int = 1, why: str = ""
) -> TablePlan:
    """Cut a table as ``sharding`` says and put the pieces on ``ranks``.

    Args:
        config: the table.
        sharding: the kind.
        ranks: table_wise takes the first; column_wise and row_wise cut one piece for each; table_row_wise expects the
            ranks of one node; grid cuts columns over the nodes of ``ranks`` and each piece's rows within its node;
            replicated expects all ranks.
        ranks_per_node: for grid.
        why: is kept.
    """
    rows, columns = [(0, config.num_rows)], [(0, config.dim)]
    if sharding == "replicated":
        places = [(rows[0], columns[0], rank) for rank in ranks]
    elif sharding == "table_wise":
        places = [(rows[0], columns[0], ranks[0])]
    elif sharding == "column_wise":
        places = [
            (rows[0], piece, rank) for piece, rank in zip(split_evenly(config.dim, len(ranks)), ranks, strict=True)
        ]
    elif sharding in ("row_wise", "table_row_wise"):
        pieces = split_evenly(config.num_rows, len(ranks))
        places = [(piece, columns[0], rank) for piece, rank in zip(pieces, ranks, strict=True)]
    else:
        nodes: dict[int, list[int]] = {}
        for rank in ranks:
            nodes.setdefault(rank // ranks_per_node, []).append(rank)
        places = [
            (row_piece, column_piece, rank)
            for column_piece, node in zip(split_evenly(config.dim, len(nodes)), nodes.values(), strict=True)
            for row_piece, rank in zip(split_evenly(config.num_rows, len(node)), node, strict=True)
        ]
    shards = [
        Shard(
            table=config.name,
            rank=rank,
            first_row=row[0],
            num_rows=row[1],
            first_column=column[0],
            num_columns=column[1],
        )
        for row, column, rank in places
        if row[1] and column[1]
    ]
    if sharding != "replicated":
        shards.sort(key=lambda shard: (shard.first_row, shard.first_column))
    return TablePlan(table=config.name, sharding=sharding, shards=tuple(shards), why=why)


def _check_tiles(config: TableConfig, table: TablePlan, ranks: int) -> None:
    whole = config.num_rows * config.dim
    for shard in table.shards:
        inside = (
            shard.table == config.name
            and 0 <= shard.rank < ranks
            and 0 <= shard.first_row < shard.first_row + shard.num_rows <= config.num_rows
            and 0 <= shard.first_column < shard.first_column + shard.num_columns <= config.dim
        )
        if not inside:
            raise ValueError(
                f"plan: expected shards inside table {config.name!r} and on ranks below {ranks}, got {shard}"
            )
    if table.sharding == "replicated":
        if [(s.rank, s.num_rows * s.num_columns) for s in table.shards] != [(rank, whole) for rank in range(ranks)]:
            raise ValueError(f"plan: expected all of table {config.name!r} once on each rank, got {table.shards}")
    elif sum(s.num_rows * s.num_columns for s in table.shards) != whole or _overlap(table.shards):
        raise ValueError(f"plan: expected the shards of table {config.name!r} to tile it, got {table.shards}")


def _overlap(shards: Iterable[Shard]) -> bool:
    seen: list[Shard] = []
    for shard in shards:
        for other in seen:
            rows_meet = (
                shard.first_row < other.first_row + other.num_rows
                and other.first_row < shard.first_row + shard.num_rows
            )
            columns_meet = (
                shard.first_column < other.first_column + other.num_columns
                and other.first_column < shard.first_column + shard.num_columns
            )
            if rows_meet and columns_meet:
                return True
        seen.append(shard)
    return False

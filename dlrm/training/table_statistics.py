"""What tables look like after training: size, how many rows moved, how long rows are; shards are counted together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dlrm.distributed.ranks import ALONE, Ranks
from embeddings import TableConfig
from embeddings.interface import FarTable, TableRows, Tables, read_blocks

ROWS_AT_ONCE = 1 << 16
# States that are above 0 in every row that was ever updated.
TELLING_STATES = ("sum_of_squares", "second_moment")


@torch.no_grad()
def describe_rows(every_tables: Iterable[Tables], ranks: Ranks = ALONE) -> list[dict[str, Any]]:
    """Return one dictionary per table: name, features, num_rows, dim, bytes, share of rows trained, mean row norm.

    On several ranks it is a collective call, which gives the same on all. A copy of what another rank holds as well is
    not counted. Rows that other processes hold are read block by block, all of them.
    """
    described = []
    for tables in every_tables:
        if far := tables.far_tables():
            described += [_describe_far(table) for table in far]
            continue
        for config in tables.table_configs:
            held = [rows for rows in tables.rows() if rows.config.name == config.name and rows.is_primary]
            described.append(_describe(config, held, ranks))
    return described


def _describe_far(table: FarTable) -> dict[str, Any]:
    """Describe a table that other processes hold, in one pass over its rows."""
    norms, trained, is_known = 0.0, 0, True
    for rows in read_blocks(table):
        norms += _sum_norms([rows])
        count = _count_trained(rows)
        trained, is_known = trained + (count or 0), is_known and count is not None
    total_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in table.tensors().values())
    return _facts(table.config, total_bytes, trained if is_known else None, norms)


def _describe(config: TableConfig, held: list[TableRows], ranks: Ranks) -> dict[str, Any]:
    """Describe a table of which this rank holds some rectangles, or none."""
    own_bytes = sum(rows.weight.nbytes + sum(state.nbytes for state in rows.state.values()) for rows in held)
    own_trained = [_count_trained(rows) for rows in held]
    is_cut = float(any(rows.weight.shape[1] < config.dim for rows in held))
    total_bytes, trained, unknown, cuts = ranks.sum(
        [own_bytes, sum(count or 0 for count in own_trained), float(None in own_trained), is_cut]
    )
    # A row's norm is a sum over columns, which may lie on several ranks.
    norms = _whole_norms(config, held, ranks) if cuts else ranks.sum([_sum_norms(held)])[0]
    return _facts(config, int(total_bytes), None if unknown else int(trained), norms)


def _facts(config: TableConfig, total_bytes: int, trained: int | None, norms: float) -> dict[str, Any]:
    return {
        "name": config.name,
        "features": list(config.features),
        "num_rows": config.num_rows,
        "dim": config.dim,
        "pooling": config.pooling,
        "optimizer": type(config.optimizer).__name__,
        "bytes": total_bytes,
        "trained_rows": trained,
        "mean_row_norm": norms / config.num_rows,
    }


def _sum_norms(held: list[TableRows]) -> float:
    pieces = (piece for rows in held for piece in rows.weight.split(ROWS_AT_ONCE))
    return sum(float(piece.float().norm(dim=1).sum()) for piece in pieces)


def _whole_norms(config: TableConfig, held: list[TableRows], ranks: Ranks) -> float:
    """Sum the norms of a table's rows whose columns lie apart, a few rows at once."""
    total = 0.0
    for first in range(0, config.num_rows, ROWS_AT_ONCE):
        squares = torch.zeros(min(ROWS_AT_ONCE, config.num_rows - first), dtype=torch.float64)
        for place, piece in _pieces(held, first, len(squares)):
            squares[place : place + len(piece)] += piece.double().square().sum(dim=1).cpu()
        total += float(ranks.sum_tensor(squares).sqrt().sum())
    return total


def _pieces(held: list[TableRows], first: int, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield what is held of rows [first, first + count), and where within these it begins."""
    for rows in held:
        start, stop = max(first, rows.first_row), min(first + count, rows.first_row + len(rows.weight))
        if start < stop:
            yield start - first, rows.weight[start - rows.first_row : stop - rows.first_row]


def _count_trained(rows: TableRows) -> int | None:
    """Count the rows that have been updated, where the optimizer's state tells; those cut by columns once."""
    state = next((rows.state[name] for name in TELLING_STATES if name in rows.state), None)
    if state is None:
        return None
    if rows.first_column:
        return 0
    pieces = state.split(ROWS_AT_ONCE)
    return sum(int(((piece > 0) if piece.dim() == 1 else (piece > 0).any(dim=1)).sum()) for piece in pieces)

"""What tables look like after training: size, how many rows moved, how long rows are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from embeddings.interface import Tables

ROWS_AT_ONCE = 1 << 16


@torch.no_grad()
def describe_rows(every_tables: Iterable[Tables]) -> list[dict[str, Any]]:
    """Return one dictionary per table: name, features, num_rows, dim, bytes, share of rows trained, mean row norm."""
    return [
        {
            "name": rows.config.name,
            "features": list(rows.config.features),
            "num_rows": rows.config.num_rows,
            "dim": rows.config.dim,
            "pooling": rows.config.pooling,
            "optimizer": type(rows.config.optimizer).__name__,
            "bytes": rows.weight.nbytes + sum(state.nbytes for state in rows.state.values()),
            "trained_rows": _count_trained(rows.state),
            "mean_row_norm": _mean_norm(rows.weight),
        }
        for tables in every_tables
        for rows in tables.rows()
    ]


def _mean_norm(weight: torch.Tensor) -> float:
    total = sum(float(rows.norm(dim=1).sum()) for rows in weight.split(ROWS_AT_ONCE))
    return total / len(weight)


def _count_trained(state: Mapping[str, torch.Tensor]) -> int | None:
    """Count the rows that have been updated, where the optimizer's state tells."""
    return int((state["sum_of_squares"] > 0).sum()) if "sum_of_squares" in state else None

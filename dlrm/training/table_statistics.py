"""What tables look like after training: size, how many rows moved, how long rows are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from embeddings.interface import Tables

ROWS_AT_ONCE = 1 << 16


@torch.no_grad()
def describe_rows(every_tables: Iterable[Tables]) -> list[dict[str, Any]]:
    """Return one dictionary per table: name, features, num_rows, dim, bytes, share of rows trained, mean row norm."""
    return [
        {
            "name": config.name,
            "features": list(config.features),
            "num_rows": config.num_rows,
            "dim": config.dim,
            "pooling": config.pooling,
            "optimizer": type(config.optimizer).__name__,
            "bytes": weight.nbytes + (state.nbytes if state is not None else 0),
            "trained_rows": None if state is None else int((state > 0).sum()),
            "mean_row_norm": _mean_norm(weight),
        }
        for tables in every_tables
        for config, weight, state in tables.rows()
    ]


def _mean_norm(weight: torch.Tensor) -> float:
    total = sum(float(rows.norm(dim=1).sum()) for rows in weight.split(ROWS_AT_ONCE))
    return total / len(weight)

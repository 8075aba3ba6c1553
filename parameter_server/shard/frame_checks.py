"""What a shard checks of a frame's rows before it uses them; messages name the table and the id."""

from __future__ import annotations

import numpy as np

from embeddings.kernels.routing_kernels import find_disorder, find_not_finite
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.errors import Refusal, RefusedError
from parameter_server.wire import Frame


def check_ids(frame: Frame, config: TableConfig) -> None:
    """Checks that ids lie in their table.

    Raises:
        RefusedError: With INVALID_ARGUMENT: one does not.
    """
    if config.num_rows == UNBOUNDED or not frame.ids.size:
        return
    for id in (int(frame.ids.min()), int(frame.ids.max())):
        if not 0 <= id < config.num_rows:
            raise _wrong(config, f"expected ids in [0, {config.num_rows}), got {id}")


def check_gradients(frame: Frame, config: TableConfig, salt: np.uint64) -> None:
    """Checks that each id is there once, and that gradients are finite.

    Raises:
        RefusedError: With INVALID_ARGUMENT: they are not.
    """
    ids = frame.ids
    if find_disorder(ids, salt) >= 0:  # of another sender than ours, who puts them in an order that tells
        ordered = np.sort(ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise _wrong(config, f"expected each id once in a push, got {repeated[0]} again")
    if (row := find_not_finite(frame.values)) >= 0:
        values = frame.values[row]
        raise _wrong(config, f"id {ids[row]}: expected a finite gradient, got {values[~np.isfinite(values)][0]}")


def _wrong(config: TableConfig, message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, f"table {config.name!r}: {message}")

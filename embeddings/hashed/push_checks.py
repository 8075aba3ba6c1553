"""What a table on demand refuses before it changes anything."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.routing_kernels import find_disorder
from embeddings.row_optimizers import moves_all_rows, trust_of
from embeddings.tables import UNBOUNDED, TableConfig

Longs = NDArray[np.int64]
Values = NDArray[np.float32] | NDArray[np.float16]


def check_config(config: TableConfig) -> None:
    """Checks that a table's rows can be updated one by one, in fp32.

    Raises:
        ValueError: When they cannot; the message names what to use instead.
    """
    name = config.name
    if config.row_type != "fp32":
        raise ValueError(f"table {name!r}: expected row_type 'fp32' for rows on demand, got {config.row_type!r}")
    if moves_all_rows(config.optimizer) or trust_of(config.optimizer) != "row":
        raise ValueError(
            f"table {name!r}: expected an optimizer that updates rows one by one, such as RowLamb(trust='row') or "
            f"RowCowClip(l2_mode='lazy'), got {config.optimizer}"
        )


def check_push(config: TableConfig, salt: np.uint64, ids: Longs, gradients: Values, counts: Longs) -> None:
    """Checks a push; ``salt`` is that of hashes.

    Raises:
        ValueError: When an id is outside the table or given twice, or shapes do not fit.
    """
    check_ids(config, ids)
    if gradients.shape != (ids.size, config.dim):
        raise ValueError(f"table {config.name!r}: expected gradients {(ids.size, config.dim)}, got {gradients.shape}")
    if counts.size not in (0, ids.size):
        raise ValueError(f"table {config.name!r}: expected {ids.size} counts, or none, got {counts.size}")
    # Ids mostly come in order, their own or that of their hashes, which is seen at once.
    if ids.size > 1 and not (ids[1:] > ids[:-1]).all() and find_disorder(ids, salt) >= 0:
        ordered = np.sort(ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise ValueError(f"table {config.name!r}: expected each id once in a push, got {repeated[0]} again")


def check_pull(config: TableConfig, ids: Longs, out: Values) -> None:
    """Checks a pull.

    Raises:
        ValueError: When an id is outside the table, or there is no room for a row of each.
    """
    check_ids(config, ids)
    if out.shape != (ids.size, config.dim):
        raise ValueError(f"table {config.name!r}: expected room for rows {(ids.size, config.dim)}, got {out.shape}")


def check_ids(config: TableConfig, ids: Longs) -> None:
    """Checks that all ids are the table's.

    Raises:
        ValueError: When one is not.
    """
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise ValueError(f"table {config.name!r}: expected ids [n] of int64, got {ids.dtype} {ids.shape}")
    if config.num_rows == UNBOUNDED or not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.num_rows:
        wrong = low if low < 0 else high
        raise ValueError(f"table {config.name!r}: expected ids in [0, {config.num_rows}), got {wrong}")


def as_integers(values: Values) -> NDArray[Any]:
    """Gives float16 as int16, since Numba does not know it, and float32 as it is; contiguous and flat.

    Raises:
        ValueError: When it is neither.
    """
    if values.dtype not in (np.float32, np.float16) or not values.flags.c_contiguous:
        raise ValueError(f"rows: expected contiguous float32 or float16, got {values.dtype}, strides {values.strides}")
    return (values.view(np.int16) if values.dtype == np.float16 else values).reshape(-1)

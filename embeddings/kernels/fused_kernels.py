"""Update each row of a batch once, in one call, compiled by Numba: a block of rows at a time, through all stages."""

from __future__ import annotations

import numpy as np

from embeddings.kernels.compiled import compiled
from embeddings.kernels.grouping_kernels import Floats, Keys, Longs, sum_gradients
from embeddings.kernels.moment_kernels import (
    finish_adam,
    finish_lamb,
    measure_directions,
    measure_partial_directions,
    measure_squares,
)
from embeddings.kernels.sixteen_bit_kernels import Rounding, Rows, borrow_rows, return_rows
from embeddings.kernels.update_kernels import (
    ADAGRAD,
    ADAM,
    LAMB,
    MEASURES,
    PARTIAL_LAMB,
    ROW_WISE_ADAGRAD,
    SGD,
    Doubles,
    UpdateSettings,
    finish_adagrad,
    finish_row_wise_adagrad,
    finish_sgd,
    measure_gradients,
)

_BLOCK = 32  # rows whose gradients are summed, and which are then updated from the nearest cache


@compiled
def update_rows(
    weight: Rows,
    keys: Keys,
    places: Longs,
    scales: Floats,
    gradient: Floats,
    first: Floats,
    second: Floats,
    settings: UpdateSettings,
    rounding: Rounding,
) -> None:
    """Updates each row in ``keys`` once; ``keys``, ``places`` and ``scales`` are those of ``group_by_row``."""
    shape = (_BLOCK, weight.shape[1])
    rows, measured = np.empty(_BLOCK, np.uint64), np.empty((_BLOCK, MEASURES))
    sums, scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)
    key = 0
    while key < keys.size:
        used, key = sum_gradients(keys, key, places, scales, gradient, weight, first, second, rows, sums)
        held, at = borrow_rows(weight, rows[:used], scratch)
        _run_stages(held, at, rows, sums, first, second, measured, settings)
        return_rows(weight, rows[:used], scratch, rounding)


@compiled
def _run_stages(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    kind = settings.kind
    if kind == SGD:
        finish_sgd(held, at, rows, sums, first, second, measured, settings)
    elif kind == ADAGRAD:
        finish_adagrad(held, at, rows, sums, first, second, measured, settings)
    elif kind == ROW_WISE_ADAGRAD:
        measure_gradients(held, at, rows, sums, first, second, measured, settings)
        finish_row_wise_adagrad(held, at, rows, sums, first, second, measured, settings)
    elif kind == ADAM:
        finish_adam(held, at, rows, sums, first, second, measured, settings)
    elif kind == LAMB:
        measure_directions(held, at, rows, sums, first, second, measured, settings)
        finish_lamb(held, at, rows, sums, first, second, measured, settings)
    elif kind == PARTIAL_LAMB:
        measure_squares(held, at, rows, sums, first, second, measured, settings)
        measure_partial_directions(held, at, rows, sums, first, second, measured, settings)
        finish_lamb(held, at, rows, sums, first, second, measured, settings)

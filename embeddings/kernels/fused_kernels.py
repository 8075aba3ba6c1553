"""Update each row of a batch or a table once, in one call, by Numba: a block of rows at a time, through all stages."""

from __future__ import annotations

import numpy as np

from embeddings.kernels.compiled import compiled
from embeddings.kernels.grouping_kernels import (
    Doubles,
    Floats,
    Keys,
    Longs,
    count_ids,
    sum_all_gradients,
    sum_gradients,
)
from embeddings.kernels.moment_kernels import (
    finish_adam,
    finish_cow_clip,
    finish_lamb,
    measure_directions,
    measure_gradients_with_l2,
    measure_partial_directions,
    measure_squares,
    take_gaps,
)
from embeddings.kernels.sixteen_bit_kernels import Rounding, Rows, borrow_rows, return_rows
from embeddings.kernels.update_kernels import (
    ADAGRAD,
    ADAM,
    COW_CLIP,
    IDS,
    LAMB,
    MEASURES,
    PARTIAL_LAMB,
    ROW_WISE_ADAGRAD,
    SGD,
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
    last: Floats,  # see ``take_gaps``
    settings: UpdateSettings,
    rounding: Rounding,
) -> None:
    """Updates each row in ``keys`` once; ``keys``, ``places`` and ``scales`` are those of ``group_by_row``."""
    shape = (_BLOCK, weight.shape[1])
    rows, measured = np.empty(_BLOCK, np.uint64), np.empty((_BLOCK, MEASURES))
    sums, scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)
    key = 0
    while key < keys.size:
        before = key
        used, key = sum_gradients(keys, key, places, scales, gradient, weight, first, second, rows, sums)
        if settings.kind == COW_CLIP:
            count_ids(keys, before, key, measured[:, IDS])
            take_gaps(rows[:used], last, measured, settings)
        held, at = borrow_rows(weight, rows[:used], scratch)
        run_block(held, at, rows, sums, first, second, measured, settings)
        return_rows(weight, rows[:used], scratch, rounding)


@compiled
def update_all_rows(
    weight: Rows,
    keys: Keys,
    places: Longs,
    scales: Floats,
    gradient: Floats,
    first: Floats,
    second: Floats,
    last: Floats,
    settings: UpdateSettings,
    rounding: Rounding,
    share: int,
    shares: int,
) -> None:
    """Updates each row with ``row % shares == share`` once, also where ``keys``, which are of these rows, has none."""
    shape = (_BLOCK, weight.shape[1])
    rows, measured = np.empty(_BLOCK, np.uint64), np.empty((_BLOCK, MEASURES))
    sums, scratch = np.empty(shape, np.float32), np.empty(shape, np.float32)
    key, row = 0, share
    while row < weight.shape[0]:
        where = (row, shares, weight.shape[0])
        used, key = sum_all_gradients(keys, key, places, scales, gradient, *where, rows, sums, measured[:, IDS])
        take_gaps(rows[:used], last, measured, settings)
        held, at = borrow_rows(weight, rows[:used], scratch)
        run_block(held, at, rows, sums, first, second, measured, settings)
        return_rows(weight, rows[:used], scratch, rounding)
        row += used * shares


@compiled
def run_block(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Runs all stages of an update on some rows; see ``finish_sgd`` for what they are given."""
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
    elif kind == COW_CLIP:
        measure_gradients_with_l2(held, at, rows, sums, first, second, measured, settings)
        finish_cow_clip(held, at, rows, sums, first, second, measured, settings)

"""Look up and pool, compiled by Numba: one pass over the ids of one table, or of a rectangle of it.

Two habits keep the inner loops vectorised, here and in the other kernels: a row is sliced before it is walked (a
signed ``column + d`` would have to be checked for being negative, number by number), and ids are unsigned, which makes
one comparison of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled
from embeddings.prefetch import prefetch
from embeddings.sixteen_bit_kernels import Rows, widen

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_AHEAD = 8  # how many ids ahead to ask for what an id needs


@compiled
def look_up(
    weight: Rows,  # [num_rows, dim]
    ids: NDArray[Any],  # [num_ids], int32 or int64
    offsets: Longs,  # [cells + 1]
    weights: Floats,  # [num_ids], or empty: all ones
    segments: Longs,  # [k, 5] of this table
    first: int,  # cell, counted through the segments
    last: int,
    mean: bool,
    pooled: Floats,  # flat, written
) -> int:
    """Pools the bags ``first`` to ``last`` of a table into their places in ``pooled``.

    Returns:
        -1, or the place in ``ids`` of the first id outside the table; nothing is read for it.
    """
    num_rows = np.uint64(weight.shape[0])
    dim = weight.shape[1]
    before = 0
    for segment in range(segments.shape[0]):
        cells, count, start, stride = segments[segment, 1:]
        for number in range(max(first - before, 0), min(last - before, count)):
            place = start + number * stride
            out = pooled[place : place + dim]
            begin, end = offsets[cells + number], offsets[cells + number + 1]
            if begin == end:
                for d in range(dim):
                    out[d] = 0
            for at in range(begin, end):
                if at + _AHEAD < ids.size:
                    prefetch(weight[np.uint64(ids[at + _AHEAD])])
                row = np.uint64(ids[at])  # a negative id becomes a huge one
                if row >= num_rows:
                    return at
                vector = weight[row]
                share = weights[at] if weights.size else np.float32(1)
                if at == begin:
                    for d in range(dim):
                        out[d] = share * widen(vector[d])
                else:
                    for d in range(dim):
                        out[d] += share * widen(vector[d])
            if mean and end - begin > 1:
                share = np.float32(1) / np.float32(end - begin)
                for d in range(dim):
                    out[d] *= share
        before += count
    return -1

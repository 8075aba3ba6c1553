"""Look up and pool, compiled by Numba: one pass over the ids of one table, or of a rectangle of it.

What decides is memory: rows lie at random in far more of it than a cache holds. So rows are asked for ahead; a bag is
summed in registers and written once; and where all bags together are as large as a cache, they are written past it,
which neither reads first what is overwritten nor drives out what is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled, inlined
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.sixteen_bit_kernels import Rows, widen
from embeddings.kernels.vectors import (
    LANES,
    REGISTER_BYTES,
    finish_streams,
    load_wide,
    multiply_add,
    splat,
    store,
    stream,
)

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_AHEAD = 24  # how many ids ahead to ask for a row
_BLOCK = 4 * LANES  # columns that are summed at a time
_STREAMED_NUMBERS = 1 << 22  # 16 MiB: as many are written past the caches


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
    before = 0
    for segment in range(segments.shape[0]):
        cells, count, start, stride = segments[segment, 1:]
        low, high = max(first - before, 0), min(last - before, count)
        before += count
        if low >= high:
            continue
        bounds = offsets[cells + low : cells + high + 1]
        wrong: int = _find_outside(ids, bounds[0], bounds[-1], weight.shape[0])
        if wrong >= 0:
            return wrong
        place = start + low * stride
        streamed = _can_stream(pooled, place, stride)
        if _are_single(bounds) and not weights.size:
            _copy_rows(weight, ids[bounds[0] : bounds[-1]], pooled, place, stride, streamed)
        else:
            _pool_cells(weight, ids, bounds, weights, mean, pooled, place, stride, streamed)
    finish_streams()
    return -1


@compiled
def _find_outside(ids: NDArray[Any], first: int, last: int, num_rows: int) -> int:
    limit = np.uint64(num_rows)
    some = ids[first:last]
    outside: Any = 0
    for i in range(some.size):
        outside |= np.uint64(some[i]) >= limit  # a negative id becomes a huge one
    if outside:
        for i in range(some.size):
            if np.uint64(some[i]) >= limit:
                return first + i
    return -1


@compiled
def _are_single(bounds: Longs) -> bool:
    others: Any = 0
    for i in range(bounds.size - 1):
        others |= bounds[np.uint64(i + 1)] - bounds[np.uint64(i)] != 1
    return bool(others == 0)


@compiled
def _can_stream(pooled: Floats, place: int, stride: int) -> bool:
    width = np.uint64(REGISTER_BYTES)
    first_byte = np.uint64(pooled.ctypes.data) + np.uint64(4 * place)
    is_whole: Any = first_byte % width == 0 and np.uint64(4 * stride) % width == 0
    return bool(is_whole and pooled.size >= _STREAMED_NUMBERS)


@compiled
def _copy_rows(weight: Rows, ids: NDArray[Any], pooled: Floats, place: int, stride: int, streamed: bool) -> None:
    dim = weight.shape[1]
    wide = dim - dim % _BLOCK
    rows = weight.reshape(-1)
    for i in range(ids.size):
        if i + _AHEAD < ids.size:
            prefetch(weight[np.uint64(ids[np.uint64(i + _AHEAD)])])
        row = np.uint64(ids[np.uint64(i)])
        for d in range(0, wide, _BLOCK):
            at = np.int64(row) * dim + d
            a, b = load_wide(rows, at), load_wide(rows, at + LANES)
            c, e = load_wide(rows, at + 2 * LANES), load_wide(rows, at + 3 * LANES)
            _write_block(pooled, place + d, a, b, c, e, streamed)
        if wide < dim:
            vector, out = weight[row, np.uint64(wide) :], pooled[place + wide : place + dim]
            for d in range(out.size):
                out[d] = widen(vector[d])
        place += stride


@inlined
def _write_block(pooled: Any, place: Any, a: Any, b: Any, c: Any, e: Any, streamed: Any) -> None:
    if streamed:
        stream(pooled, place, a)
        stream(pooled, place + LANES, b)
        stream(pooled, place + 2 * LANES, c)
        stream(pooled, place + 3 * LANES, e)
    else:
        store(pooled, place, a)
        store(pooled, place + LANES, b)
        store(pooled, place + 2 * LANES, c)
        store(pooled, place + 3 * LANES, e)


@compiled
def _pool_cells(
    weight: Rows,
    ids: NDArray[Any],
    bounds: Longs,
    weights: Floats,
    mean: bool,
    pooled: Floats,
    place: int,
    stride: int,
    streamed: bool,
) -> None:
    dim = weight.shape[1]
    wide = dim - dim % _BLOCK
    rows = weight.reshape(-1)
    last = bounds[-1]
    for cell in range(bounds.size - 1):
        begin, end = bounds[cell], bounds[cell + 1]
        share = np.float32(1)
        if mean and end > begin:
            share /= np.float32(end - begin)
        for at in range(begin + _AHEAD, min(end + _AHEAD, last)):
            prefetch(weight[np.uint64(ids[at])])
        for d in range(0, wide, _BLOCK):
            a, b, c, e = _pool_block(rows, dim, d, ids, begin, end, weights, share)
            _write_block(pooled, place + d, a, b, c, e, streamed)
        if wide < dim:
            _pool_rest(weight, wide, ids, begin, end, weights, share, pooled[place + wide : place + dim])
        place += stride


@inlined
def _pool_block(rows: Any, dim: Any, d: Any, ids: Any, begin: Any, end: Any, weights: Any, share: Any) -> Any:
    zero = splat(np.float32(0))
    a, b, c, e = zero, zero, zero, zero
    for at in range(begin, end):
        scale = splat(weights[at] if weights.size else np.float32(1))
        source = np.int64(ids[at]) * dim + d
        a = multiply_add(load_wide(rows, source), scale, a)
        b = multiply_add(load_wide(rows, source + LANES), scale, b)
        c = multiply_add(load_wide(rows, source + 2 * LANES), scale, c)
        e = multiply_add(load_wide(rows, source + 3 * LANES), scale, e)
    if share != np.float32(1):
        scale = splat(share)
        a, b = multiply_add(a, scale, zero), multiply_add(b, scale, zero)
        c, e = multiply_add(c, scale, zero), multiply_add(e, scale, zero)
    return a, b, c, e


@compiled
def _pool_rest(
    weight: Rows, first: int, ids: NDArray[Any], begin: int, end: int, weights: Floats, share: Any, out: Floats
) -> None:
    for d in range(out.size):
        out[d] = 0
    for at in range(begin, end):
        vector = weight[np.uint64(ids[at]), np.uint64(first) :]
        scale = weights[at] if weights.size else np.float32(1)
        for d in range(out.size):
            out[d] += scale * widen(vector[d])
    if share != np.float32(1):
        for d in range(out.size):
            out[d] *= share

"""Group a batch's ids by row and sum their gradients, compiled by Numba, so that each row is updated once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled, inlined
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[Any]
Longs = NDArray[np.int64]
Keys = NDArray[np.uint64]

_MAX_DIGIT_BITS = 11  # 2,048 counters fit beside the keys in the first-level cache
_AHEAD = 8  # how many ids ahead to ask for what an id needs
_BLOCK = 4 * LANES  # columns that are summed at a time
_ENTRY_BITS = np.uint64(32)
_ENTRY_MASK = np.uint64(0xFFFFFFFF)


@compiled
def group_by_row(
    ids: Ids,  # [num_ids], int32 or int64, inside the table
    offsets: Longs,  # [cells + 1]
    weights: Floats,  # [num_ids], or empty: all ones
    segments: Longs,  # [k, 5] of this table
    mean: bool,
    num_rows: int,
    part: int,
    parts: int,
) -> tuple[Keys, Longs, Floats]:
    """Sorts a table's ids by row, and within a row by their order in the batch.

    A key is ``row << 32 | entry``, where entries number the table's cells through its segments, or its ids where they
    have weights. Of several parts, each takes the rows with ``row % parts == part``: neighbours, which are often
    equally popular, part.

    Returns:
        The keys; where each entry's gradient begins in the flat tensor; and what it is multiplied by, or nothing
        where that is always 1.
    """
    keys = _sort_by_row(_collect_keys(ids, offsets, weights.size > 0, segments, part, parts), num_rows)
    places, scales = _place_entries(offsets, weights, segments, mean)
    return keys, places, scales


@compiled
def _collect_keys(ids: Ids, offsets: Longs, weighted: bool, segments: Longs, part: int, parts: int) -> Keys:
    count = 0
    for _, cells, number, _, _ in segments:
        count += offsets[cells + number] - offsets[cells]
    keys = np.empty(count, np.uint64)
    used = np.uint64(0)
    entry = np.uint64(0)
    for _, cells, number, _, _ in segments:
        for cell in range(cells, cells + number):
            for at in range(offsets[cell], offsets[cell + 1]):
                row = np.uint64(ids[np.uint64(at)])
                if parts == 1 or row % np.uint64(parts) == np.uint64(part):
                    keys[used] = row << _ENTRY_BITS | entry
                    used += np.uint64(1)
                if weighted:
                    entry += np.uint64(1)
            if not weighted:
                entry += np.uint64(1)
    return keys[:used]


@compiled
def _sort_by_row(keys: Keys, num_rows: int) -> Keys:
    # Least significant digit first, so stably.
    bits = 1
    while num_rows > 1 << bits:
        bits += 1
    passes = (bits + _MAX_DIGIT_BITS - 1) // _MAX_DIGIT_BITS
    digit_bits = (bits + passes - 1) // passes
    mask = np.uint64((1 << digit_bits) - 1)
    spare = np.empty(keys.size, np.uint64)
    # Unsigned, like every index below: one that may be negative is checked for it.
    starts = np.empty(1 << digit_bits, np.uint64)
    for digit in range(passes):
        shift = _ENTRY_BITS + np.uint64(digit * digit_bits)
        starts[:] = 0
        for i in range(keys.size):
            starts[keys[np.uint64(i)] >> shift & mask] += np.uint64(1)
        before = np.uint64(0)
        for value in range(starts.size):
            before, starts[value] = before + starts[value], before
        for i in range(keys.size):
            key = keys[np.uint64(i)]
            bucket = key >> shift & mask
            spare[starts[bucket]] = key
            starts[bucket] += np.uint64(1)
        keys, spare = spare, keys
    return keys


@compiled
def _place_entries(offsets: Longs, weights: Floats, segments: Longs, mean: bool) -> tuple[Longs, Floats]:
    weighted = weights.size > 0
    count = 0
    for _, cells, number, _, _ in segments:
        count += offsets[cells + number] - offsets[cells] if weighted else number
    places = np.empty(count, np.int64)
    scales = np.empty(count if weighted or mean else 0, np.float32)
    entry = 0
    for _, cells, number, start, stride in segments:
        for i in range(number):
            begin, end = offsets[cells + i], offsets[cells + i + 1]
            share = np.float32(1)
            if mean and end > begin:
                share /= np.float32(end - begin)
            if weighted:
                for at in range(begin, end):
                    places[entry] = start + i * stride
                    scales[entry] = share * weights[at]
                    entry += 1
            else:
                places[entry] = start + i * stride
                if mean:
                    scales[entry] = share
                entry += 1
    return places, scales


@compiled
def count_rows(keys: Keys) -> int:
    """Counts the different rows among sorted keys."""
    count = 0
    for i in range(keys.size):
        if i == 0 or keys[i] >> _ENTRY_BITS != keys[i - 1] >> _ENTRY_BITS:
            count += 1
    return count


@compiled
def sum_gradients(
    keys: Keys,
    first: int,
    places: Longs,
    scales: Floats,
    gradient: Floats,  # flat
    weight: NDArray[Any],  # [num_rows, dim], asked for
    first_state: Floats,  # [num_rows or 0, dim or 1], asked for
    second_state: Floats,
    rows: Keys,  # [block], written
    sums: Floats,  # [block, dim], written
) -> tuple[int, int]:
    """Sums the gradients of each of the next rows, in batch order.

    Returns:
        The number of rows, and the place in ``keys`` of the row after them.
    """
    dim = sums.shape[1]
    flat = sums.reshape(-1)
    used = 0
    at = first
    while at < keys.size and used < rows.size:
        row = keys[at] >> _ENTRY_BITS
        prefetch(weight[row])
        if first_state.size:
            prefetch(first_state[row])
        if second_state.size:
            prefetch(second_state[row])
        end = at
        while end < keys.size and keys[end] >> _ENTRY_BITS == row:
            if end + _AHEAD < keys.size:
                place = places[keys[end + _AHEAD] & _ENTRY_MASK]
                prefetch(gradient[place : place + dim])
            end += 1
        _sum_entries(keys, at, end, places, scales, gradient, flat, used * dim, dim)
        rows[used] = row
        used += 1
        at = end
    return used, at


@compiled
def sum_all_gradients(
    keys: Keys,
    first: int,
    places: Longs,
    scales: Floats,
    gradient: Floats,  # flat
    row: int,
    step: int,
    num_rows: int,
    rows: Keys,  # [block], written
    sums: Floats,  # [block, dim], written
    counts: Doubles,  # [block], written: how many ids each has, or 1
) -> tuple[int, int]:
    """Does as ``sum_gradients`` for the rows from ``row`` on, each ``step``-th, whether they have gradients or not."""
    dim = sums.shape[1]
    flat = sums.reshape(-1)
    used = 0
    at = first
    while row < num_rows and used < rows.size:
        end = at
        while end < keys.size and keys[end] >> _ENTRY_BITS == np.uint64(row):
            end += 1
        _sum_entries(keys, at, end, places, scales, gradient, flat, used * dim, dim)
        rows[used] = row
        counts[used] = max(1, end - at)
        used += 1
        at = end
        row += step
    return used, at


@compiled
def count_ids(keys: Keys, first: int, end: int, counts: Doubles) -> None:
    """Counts the ids of each row that ``keys[first:end]`` name, into ``counts`` [rows]."""
    used = -1
    for at in range(first, end):
        if at == first or keys[at] >> _ENTRY_BITS != keys[at - 1] >> _ENTRY_BITS:
            used += 1
            counts[used] = 0.0
        counts[used] += 1.0


@inlined
def _sum_entries(
    keys: Any, first: Any, end: Any, places: Any, scales: Any, gradient: Any, sums: Any, start: Any, dim: Any
) -> None:
    zero = splat(np.float32(0))
    wide = dim - dim % _BLOCK
    for d in range(0, wide, _BLOCK):
        a, b, c, e = zero, zero, zero, zero
        for at in range(first, end):
            entry = keys[at] & _ENTRY_MASK
            source = places[entry] + d
            scale = splat(scales[entry] if scales.size else np.float32(1))
            a = multiply_add(load(gradient, source), scale, a)
            b = multiply_add(load(gradient, source + LANES), scale, b)
            c = multiply_add(load(gradient, source + 2 * LANES), scale, c)
            e = multiply_add(load(gradient, source + 3 * LANES), scale, e)
        store(sums, start + d, a)
        store(sums, start + d + LANES, b)
        store(sums, start + d + 2 * LANES, c)
        store(sums, start + d + 3 * LANES, e)
    for d in range(wide, dim):
        total = np.float32(0)
        for at in range(first, end):
            entry = keys[at] & _ENTRY_MASK
            total += (scales[entry] if scales.size else np.float32(1)) * gradient[places[entry] + d]
        sums[start + d] = total


@compiled
def add_gradients(
    ids: Ids,
    offsets: Longs,
    weights: Floats,
    segments: Longs,
    mean: bool,
    gradient: Floats,
    out: Floats,  # [num_rows, dim + 1], added to
    part: int,
    parts: int,
) -> None:
    """Adds each id's gradient to its row of ``out``, and 1 to that row's last number; of the rows of ``part`` only."""
    dim = out.shape[1] - 1
    places, scales = _place_entries(offsets, weights, segments, mean)
    weighted = weights.size > 0
    entry = 0
    for _, cells, number, _, _ in segments:
        for cell in range(cells, cells + number):
            for at in range(offsets[cell], offsets[cell + 1]):
                row = np.uint64(ids[at])
                if parts == 1 or row % np.uint64(parts) == np.uint64(part):
                    source = gradient[places[entry] : places[entry] + dim]
                    share = scales[entry] if scales.size else np.float32(1)
                    total = out[row]
                    for d in range(dim):
                        total[d] += share * source[d]
                    total[dim] += np.float32(1)
                if weighted:
                    entry += 1
            if not weighted:
                entry += 1

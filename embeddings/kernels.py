"""The loops over rows, compiled by Numba: look up and pool, group a batch's ids by row, update each row once.

Each function works on one table, or a part of one, in the calling thread and without the interpreter's lock;
``local_tables`` spreads the calls over threads, so that the result does not depend on their number.

Two habits keep the inner loops vectorised: a row is sliced before it is walked (a signed ``column + d`` would have to
be checked for being negative, number by number), and ids are unsigned, which makes one comparison of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.compiled import compiled, reordering
from embeddings.prefetch import prefetch

Floats = NDArray[np.float32]
Ids = NDArray[Any]
Longs = NDArray[np.int64]
Keys = NDArray[np.uint64]

_MAX_DIGIT_BITS = 11  # 2,048 counters fit beside the keys in the first-level cache
_BLOCK = 32  # rows that are asked for while their gradients are summed, and then updated from the nearest cache
_AHEAD = 8  # how many ids ahead to ask for what an id needs
_SLOT_BITS = np.uint64(32)
_SLOT_MASK = np.uint64(0xFFFFFFFF)


@compiled
def look_up(
    weight: Floats,  # [num_rows, dim]
    ids: Ids,  # [num_ids], int32 or int64
    offsets: Longs,  # [num_features * batch_size + 1]
    position: int,  # of the feature in offsets
    first_bag: int,
    last_bag: int,
    mean: bool,
    pooled: Floats,  # [batch_size, sum of dims], written
    column: int,
) -> int:
    """Pools the bags ``first_bag`` to ``last_bag`` of a feature into ``pooled``, from ``column`` on.

    Returns:
        -1, or the place in ``ids`` of the first id outside the table; nothing is read for it.
    """
    num_rows = np.uint64(weight.shape[0])
    dim = weight.shape[1]
    cell = position * pooled.shape[0]
    for bag in range(first_bag, last_bag):
        out = pooled[bag, column : column + dim]
        start = offsets[cell + bag]
        end = offsets[cell + bag + 1]
        if start == end:
            for d in range(dim):
                out[d] = 0
        for at in range(start, end):
            if at + _AHEAD < ids.size:
                prefetch(weight[np.uint64(ids[at + _AHEAD])])
            row = np.uint64(ids[at])  # a negative id becomes a huge one
            if row >= num_rows:
                return at
            vector = weight[row]
            if at == start:
                for d in range(dim):
                    out[d] = vector[d]
            else:
                for d in range(dim):
                    out[d] += vector[d]
        if mean and end - start > 1:
            share = np.float32(1) / np.float32(end - start)
            for d in range(dim):
                out[d] *= share
    return -1


@compiled
def _group_by_row(
    ids: Ids, offsets: Longs, positions: Longs, batch_size: int, num_rows: int, part: int, parts: int
) -> Keys:
    """Sorts a table's ids by row, and within a row by feature and bag: least significant digit first, so stably.

    A key is ``row << 32 | slot`` with ``slot = feature's place among the table's * batch_size + bag``. Of several
    parts, each takes the rows with ``row % parts == part``: neighbours, which are often equally popular, part.
    """
    bits = 1
    while num_rows > 1 << bits:
        bits += 1
    passes = (bits + _MAX_DIGIT_BITS - 1) // _MAX_DIGIT_BITS
    digit_bits = (bits + passes - 1) // passes
    mask = np.uint64((1 << digit_bits) - 1)
    count = 0
    for position in positions:
        count += offsets[(position + 1) * batch_size] - offsets[position * batch_size]
    keys = np.empty(count, np.uint64)
    ends = np.zeros((passes, 1 << digit_bits), np.int64)
    used = 0
    for feature in range(positions.size):
        cell = positions[feature] * batch_size
        for bag in range(batch_size):
            slot = np.uint64(feature * batch_size + bag)
            for at in range(offsets[cell + bag], offsets[cell + bag + 1]):
                row = np.uint64(ids[at])
                if parts > 1 and row % np.uint64(parts) != np.uint64(part):
                    continue
                keys[used] = row << _SLOT_BITS | slot
                used += 1
                for digit in range(passes):
                    ends[digit, row >> np.uint64(digit * digit_bits) & mask] += 1
    keys = keys[:used]
    spare = np.empty(used, np.uint64)
    for digit in range(passes):
        starts = ends[digit]
        before = np.int64(0)
        for value in range(starts.size):
            before, starts[value] = before + starts[value], before
        shift = _SLOT_BITS + np.uint64(digit * digit_bits)
        for key in keys:
            bucket = np.int64(key >> shift & mask)
            spare[starts[bucket]] = key
            starts[bucket] += 1
        keys, spare = spare, keys
    return keys


@compiled
def _sum_gradients(
    keys: Keys,
    first: int,
    offsets: Longs,
    positions: Longs,
    columns: Longs,
    mean: bool,
    gradient: Floats,  # [batch_size, sum of dims]
    weight: Floats,  # [num_rows, dim], asked for
    rows: Keys,  # [block], written
    sums: Floats,  # [block, dim], written
) -> tuple[int, int]:
    """Sums the gradients of each of the next rows, in batch order.

    Returns:
        The number of rows, and the place in ``keys`` of the row after them.
    """
    bags = np.uint64(gradient.shape[0])
    dim = sums.shape[1]
    used = 0
    at = first
    while at < keys.size:
        if at + _AHEAD < keys.size:
            feature, bag = divmod(keys[at + _AHEAD] & _SLOT_MASK, bags)
            prefetch(gradient[bag, columns[feature] : columns[feature] + dim])
        row = keys[at] >> _SLOT_BITS
        again = used > 0 and rows[used - 1] == row
        if not again:
            if used == rows.size:
                break
            prefetch(weight[row])
            rows[used] = row
            used += 1
        feature, bag = divmod(keys[at] & _SLOT_MASK, bags)
        source = gradient[bag, columns[feature] : columns[feature] + dim]
        total = sums[used - 1]
        share = np.float32(1)
        if mean:
            cell = positions[feature] * gradient.shape[0] + np.int64(bag)
            share = np.float32(1) / np.float32(offsets[cell + 1] - offsets[cell])
        if again:
            for d in range(dim):
                total[d] += share * source[d]
        else:
            for d in range(dim):
                total[d] = share * source[d]
        at += 1
    return used, at


@compiled
def update_rows_sgd(
    weight: Floats,
    ids: Ids,
    offsets: Longs,
    positions: Longs,
    columns: Longs,
    mean: bool,
    gradient: Floats,
    part: int,
    parts: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Updates each row that the batch touches once, as ``RowSGD`` says."""
    num_rows, dim = weight.shape
    rate, decay = np.float32(learning_rate), np.float32(weight_decay)
    keys = _group_by_row(ids, offsets, positions, gradient.shape[0], num_rows, part, parts)
    rows, sums = np.empty(_BLOCK, np.uint64), np.empty((_BLOCK, dim), np.float32)
    at = 0
    while at < keys.size:
        used, at = _sum_gradients(keys, at, offsets, positions, columns, mean, gradient, weight, rows, sums)
        for i in range(used):
            row, total = weight[rows[i]], sums[i]
            for d in range(dim):
                row[d] -= rate * (total[d] + decay * row[d])


@compiled
def update_rows_row_wise_adagrad(
    weight: Floats,
    sum_of_squares: Floats,  # [num_rows]
    ids: Ids,
    offsets: Longs,
    positions: Longs,
    columns: Longs,
    mean: bool,
    gradient: Floats,
    part: int,
    parts: int,
    learning_rate: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Updates each row that the batch touches once, as ``RowWiseAdagrad`` says."""
    num_rows, dim = weight.shape
    rate, decay, floor = np.float32(learning_rate), np.float32(weight_decay), np.float32(eps)
    keys = _group_by_row(ids, offsets, positions, gradient.shape[0], num_rows, part, parts)
    rows, sums = np.empty(_BLOCK, np.uint64), np.empty((_BLOCK, dim), np.float32)
    at = 0
    while at < keys.size:
        used, at = _sum_gradients(keys, at, offsets, positions, columns, mean, gradient, weight, rows, sums)
        for i in range(used):
            row, total = weight[rows[i]], sums[i]
            if decay != 0:
                for d in range(dim):
                    total[d] += decay * row[d]
            state = sum_of_squares[rows[i]] + _sum_of_squares(total) / np.float32(dim)
            sum_of_squares[rows[i]] = state
            step = rate / (np.sqrt(state) + floor)
            for d in range(dim):
                row[d] -= step * total[d]


@reordering
def _sum_of_squares(vector: Floats) -> np.float32:
    total = np.float32(0)
    for d in range(vector.size):
        total += vector[d] * vector[d]
    return total

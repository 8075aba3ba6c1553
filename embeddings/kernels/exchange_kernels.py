"""Cutting ids by shard and putting vectors in their places, compiled by Numba; see ``lanes`` for the words.

Segments are those of ``local_rows.Bags``: PART (here a feature), FIRST, COUNT, START, STRIDE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Ints = NDArray[np.int32]
Words = NDArray[np.int32]

_BLOCK = 16  # bags whose vectors are written together, so that what lies beside them is still in the cache


@compiled
def find_outside(ids: NDArray[Any], offsets: Longs, segments: Longs, num_rows: Longs) -> int:
    """Returns -1, or the place in ``ids`` of the first one outside its feature's table [num_rows[feature]]."""
    for segment in range(segments.shape[0]):
        feature, first, count = segments[segment, 0], segments[segment, 1], segments[segment, 2]
        rows = np.uint64(num_rows[feature])
        for at in range(offsets[first], offsets[first + count]):
            if np.uint64(ids[at]) >= rows:  # a negative id becomes a huge one
                return at
    return -1


@compiled
def _find_cut(row: int, first: int, last: int, per_row: float, cut_rows: Longs) -> int:
    # Most tables are cut into equal pieces, of which this guesses the right one.
    cut = min(first + int(row * per_row), last - 1)
    while row < cut_rows[cut, 0]:
        cut -= 1
    while row >= cut_rows[cut, 1]:
        cut += 1
    return cut


@compiled
def count_cells(
    ids: NDArray[Any],
    offsets: Longs,
    segments: Longs,
    feature_cuts: Longs,
    cut_rows: Longs,
    num_cells: Longs,  # [cuts], zeros, written
    num_ids: Longs,  # [cuts], zeros, written
) -> None:
    """Counts the cells and the ids of each cut; all ids lie inside their tables."""
    latest = np.full(cut_rows.shape[0], -1, np.int64)
    for segment in range(segments.shape[0]):
        feature, cells, count = segments[segment, 0], segments[segment, 1], segments[segment, 2]
        first, last = feature_cuts[feature], feature_cuts[feature + 1]
        if last == first:
            continue
        per_row = (last - first) / cut_rows[last - 1, 1]
        for bag in range(count):
            for at in range(offsets[cells + bag], offsets[cells + bag + 1]):
                cut = _find_cut(int(ids[at]), first, last, per_row, cut_rows)
                num_ids[cut] += 1
                if latest[cut] != bag:
                    latest[cut] = bag
                    num_cells[cut] += 1


@compiled
def cut_ids(
    ids: NDArray[Any],
    offsets: Longs,
    weights: Floats,  # [num_ids], or empty
    segments: Longs,
    feature_cuts: Longs,
    cut_rows: Longs,
    next_cell: Longs,  # [cuts]: where each cut's cells go; changed
    next_id: Longs,  # [cuts]; changed
    bags: Ints,  # [cells], written: of each cell
    lengths: Ints,  # [cells], written
    rows: NDArray[Any],  # [ids of all cuts], written: relative to the cut's first row
    row_weights: Floats,  # as `rows`, or empty
) -> None:
    """Writes the cells of all cuts, a cut's one after the other in the order of bags."""
    latest = np.full(cut_rows.shape[0], -1, np.int64)
    for segment in range(segments.shape[0]):
        feature, cells, count = segments[segment, 0], segments[segment, 1], segments[segment, 2]
        first, last = feature_cuts[feature], feature_cuts[feature + 1]
        if last == first:
            continue
        per_row = (last - first) / cut_rows[last - 1, 1]
        for bag in range(count):
            for at in range(offsets[cells + bag], offsets[cells + bag + 1]):
                row = int(ids[at])
                cut = _find_cut(row, first, last, per_row, cut_rows)
                if latest[cut] != bag:
                    latest[cut] = bag
                    bags[next_cell[cut]] = bag
                    lengths[next_cell[cut]] = 0
                    next_cell[cut] += 1
                lengths[next_cell[cut] - 1] += 1
                rows[next_id[cut]] = row - cut_rows[cut, 0]
                if weights.size:
                    row_weights[next_id[cut]] = weights[at]
                next_id[cut] += 1


@compiled
def pack(
    cuts: Longs,  # [lanes of the message]
    num_cells: Longs,  # [cuts]
    num_ids: Longs,
    first_cell: Longs,
    first_id: Longs,
    lengths: Ints,
    rows: Words,  # [ids of all cuts * words per id]
    words_per_id: int,
    row_weights: Words,  # [ids of all cuts], or empty
    message: Words,  # written
) -> None:
    """Writes one rank's message: the ids of all its lanes, their weights if any, and lengths that are not all 1."""
    used = 0
    for cut in cuts:
        for word in range(first_id[cut] * words_per_id, (first_id[cut] + num_ids[cut]) * words_per_id):
            message[used] = rows[word]
            used += 1
    if row_weights.size:
        for cut in cuts:
            for at in range(first_id[cut], first_id[cut] + num_ids[cut]):
                message[used] = row_weights[at]
                used += 1
    for cut in cuts:
        if num_ids[cut] > num_cells[cut]:
            for cell in range(first_cell[cut], first_cell[cut] + num_cells[cut]):
                message[used] = lengths[cell]
                used += 1


@compiled
def unpack(
    message: Words,
    num_cells: Longs,  # [lanes of the message]
    num_ids: Longs,
    words_per_id: int,
    has_weights: bool,
    first_id: int,
    rows: Words,  # [all ids * words per id], written from `first_id` on
    row_weights: Words,  # [all ids], likewise, or empty
    offsets: Longs,  # [cells of the message], written: where each cell's ids end
) -> None:
    """Reads a message that ``pack`` wrote."""
    ids = num_ids.sum()
    used = ids * words_per_id
    for word in range(used):
        rows[first_id * words_per_id + word] = message[word]
    if row_weights.size:
        for at in range(ids):
            # One that came without weights, beside others with: 1.0
            row_weights[first_id + at] = message[used + at] if has_weights else 0x3F800000
        used += ids if has_weights else 0
    end = first_id
    cell = 0
    for lane in range(num_cells.size):
        alike = num_ids[lane] == num_cells[lane]
        for _ in range(num_cells[lane]):
            end += 1 if alike else int(message[used])
            used += 0 if alike else 1
            offsets[cell] = end
            cell += 1


@compiled
def _first_not_before(bags: Ints, first: int, last: int, bag: int) -> int:
    while first < last:
        middle = (first + last) // 2
        if bags[middle] < bag:
            first = middle + 1
        else:
            last = middle
    return first


@compiled
def _find_first_cells(lanes: Longs, bags: Ints, first_cell: Longs, num_cells: Longs, first_bag: int) -> Longs:
    # [lanes]: of each, the first cell that is not of a bag before
    found = np.empty(lanes.shape[0], np.int64)
    for lane in range(lanes.shape[0]):
        cut = lanes[lane, 1]
        found[lane] = _first_not_before(bags, first_cell[cut], first_cell[cut] + num_cells[cut], first_bag)
    return found


@compiled
def _share_of(mean: bool, offsets: Longs, cell: int) -> np.float32:
    # what each id of a cell counts
    return np.float32(1) / np.float32(offsets[cell + 1] - offsets[cell]) if mean else np.float32(1)


@compiled
def place_vectors(
    vectors: Floats,  # flat
    starts: Longs,  # [lanes]: where each lane's first vector begins
    lanes: Longs,  # [lanes, 4]: feature, cut, column, width; by feature
    bags: Ints,
    first_cell: Longs,  # [cuts]
    num_cells: Longs,  # [cuts]
    offsets: Longs,
    segments: Longs,  # [features, 5]: the i-th is that of feature i
    fills: NDArray[np.bool_],  # [features]: whether each number of it is written by exactly one lane
    dims: Longs,  # [features]
    means: NDArray[np.bool_],  # [features]
    first_bag: int,
    last_bag: int,
    out: Floats,  # flat, written
) -> None:
    """Writes what the bags ``first_bag`` to ``last_bag`` pool to: the sum of their cells' vectors, or the mean."""
    cursors = _find_first_cells(lanes, bags, first_cell, num_cells, first_bag)
    for block in range(first_bag, last_bag, _BLOCK):
        end = min(block + _BLOCK, last_bag)
        for feature in range(segments.shape[0]):
            if not fills[feature]:
                for bag in range(block, min(end, segments[feature, 2])):
                    place = segments[feature, 3] + bag * segments[feature, 4]
                    out[place : place + dims[feature]] = 0
        for lane in range(lanes.shape[0]):
            feature, cut, column, width = lanes[lane]
            last = first_cell[cut] + num_cells[cut]
            cell = cursors[lane]
            while cell < last and bags[cell] < end:
                bag = int(bags[cell])
                begin = starts[lane] + (cell - first_cell[cut]) * width
                vector = vectors[begin : begin + width]
                place = segments[feature, 3] + bag * segments[feature, 4] + column
                pooled = out[place : place + width]
                share = _share_of(means[feature], offsets, segments[feature, 1] + bag)
                if fills[feature]:
                    for d in range(width):
                        pooled[d] = share * vector[d]
                else:
                    for d in range(width):
                        pooled[d] += share * vector[d]
                cell += 1
            cursors[lane] = cell


@compiled
def gather_gradients(
    gradient: Floats,  # flat: of what `place_vectors` wrote
    starts: Longs,
    lanes: Longs,
    bags: Ints,
    first_cell: Longs,
    num_cells: Longs,
    offsets: Longs,
    segments: Longs,
    means: NDArray[np.bool_],
    first_bag: int,
    last_bag: int,
    vectors: Floats,  # flat, written
) -> None:
    """Writes the gradients of the cells of the bags ``first_bag`` to ``last_bag``."""
    cursors = _find_first_cells(lanes, bags, first_cell, num_cells, first_bag)
    for block in range(first_bag, last_bag, _BLOCK):
        end = min(block + _BLOCK, last_bag)
        for lane in range(lanes.shape[0]):
            feature, cut, column, width = lanes[lane]
            last = first_cell[cut] + num_cells[cut]
            cell = cursors[lane]
            while cell < last and bags[cell] < end:
                bag = int(bags[cell])
                begin = starts[lane] + (cell - first_cell[cut]) * width
                vector = vectors[begin : begin + width]
                place = segments[feature, 3] + bag * segments[feature, 4] + column
                pooled = gradient[place : place + width]
                share = _share_of(means[feature], offsets, segments[feature, 1] + bag)
                for d in range(width):
                    vector[d] = share * pooled[d]
                cell += 1
            cursors[lane] = cell

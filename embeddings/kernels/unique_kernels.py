"""Find a batch's different ids of a table and number them, compiled by Numba, so that each row travels once.

Ids may be any 64-bit numbers: they are found by hashing, as sorting all of them would take as many passes as they have
digits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.hash_kernels import mix

Longs = NDArray[np.int64]


@compiled
def number_ids(
    ids: NDArray[Any],  # [num_ids], int32 or int64
    offsets: Longs,  # [cells + 1]
    segments: Longs,  # [k, 5] of this table, see ``Bags``
    numbers: Longs,  # [num_ids], written for the ids of these segments
) -> Longs:
    """Numbers a table's different ids in the order in which they first come.

    Returns:
        [n], the different ids; ``numbers`` are places in it.
    """
    count = 0
    for _, cells, number, _, _ in segments:
        count += offsets[cells + number] - offsets[cells]
    size = 16
    while size < 2 * count:
        size *= 2
    mask = np.uint64(size - 1)
    slots = np.zeros(size, np.uint32)  # 1 + the number of the id that lies there
    found = np.empty(count, np.int64)
    used = 0
    for _, cells, number, _, _ in segments:
        for at in range(offsets[cells], offsets[cells + number]):
            id = np.int64(ids[np.uint64(at)])
            slot = mix(np.uint64(id)) & mask
            while slots[slot] and found[np.uint64(slots[slot] - np.uint32(1))] != id:
                slot = (slot + np.uint64(1)) & mask
            if not slots[slot]:
                found[np.uint64(used)] = id
                used += 1
                slots[slot] = used
            numbers[np.uint64(at)] = np.int64(slots[slot]) - 1
    return found[:used].copy()


@compiled
def reorder_numbers(offsets: Longs, segments: Longs, order: Longs, numbers: Longs) -> None:
    """Replaces each number by its place in ``order`` [n]: afterwards they are places among the ids in that order."""
    places = np.empty(order.size, np.int64)
    for i in range(order.size):
        places[np.uint64(order[np.uint64(i)])] = i
    for _, cells, number, _, _ in segments:
        for at in range(offsets[cells], offsets[cells + number]):
            numbers[np.uint64(at)] = places[np.uint64(numbers[np.uint64(at)])]

"""Rows put in the order in which they travel, checked, and put back in their places, compiled by Numba.

Rows travel by the rank of their bucket, so that one shard's lie together, and by hash within a bucket. No two ids of a
table have the same hash: a frame in this order has each id once, which its reader sees in one pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.hash_kernels import BUCKET_BITS, bucket_of, hash_of
from embeddings.kernels.sixteen_bit_kernels import widen

Longs = NDArray[np.int64]
Words = NDArray[np.uint64]

# Of each number of a 64-bit word: its bits without the sign, the last bit of its exponent, and the sign's bit. All ones
# in an exponent, which mean infinity or NaN, carry into the sign.
_SINGLE = tuple(map(np.uint64, (0x7FFFFFFF7FFFFFFF, 0x0080000000800000, 0x8000000080000000)))
_HALF = tuple(map(np.uint64, (0x7FFF7FFF7FFF7FFF, 0x0400040004000400, 0x8000800080008000)))


@compiled
def sort_rows(ids: Longs, salt: np.uint64, ranks: NDArray[np.int32], hashes: Words, order: Longs, ends: Longs) -> int:
    """Puts ids in the order in which they travel.

    Args:
        ids: [n].
        salt: Of the table.
        ranks: [buckets]: the place of each bucket in the order.
        hashes: [n], written: of the ids, in that order.
        order: [n], written: where in ``ids`` each one is.
        ends: [buckets], written: where the rows of each rank end.

    Returns:
        -1, or the place in ``ids`` of one that was there before; nothing is of use then.
    """
    ends[:] = 0
    for i in range(ids.size):
        ends[ranks[bucket_of(ids[i], salt)]] += 1
    total = 0
    for rank in range(ends.size):
        count = ends[rank]
        ends[rank] = total
        total += count
    starts = ends.copy()
    for i in range(ids.size):
        hash = hash_of(ids[i], salt)
        rank = ranks[hash >> np.uint64(64 - BUCKET_BITS)]
        # A handful of rows share a bucket: each goes before those of larger hashes that came earlier.
        at, start = ends[rank], starts[rank]
        while at > start and hashes[at - 1] >= hash:
            if hashes[at - 1] == hash:
                return i
            hashes[at], order[at] = hashes[at - 1], order[at - 1]
            at -= 1
        hashes[at], order[at] = hash, i
        ends[rank] += 1
    return -1


@compiled
def find_disorder(ids: Longs, salt: np.uint64) -> int:
    """Returns -1, or the first place of an id whose hash is not above that of the one before it."""
    before = np.uint64(0)
    for i in range(ids.size):
        hash = hash_of(ids[i], salt)
        if i > 0 and hash <= before:
            return i
        before = hash
    return -1


@compiled
def scatter_rows(values: NDArray[Any], places: Longs, out: NDArray[np.float32]) -> None:
    """Writes the i-th of ``values`` [n, dim], float32 or float16 as int16, to row ``places[i]`` of ``out``."""
    for i in range(places.size):
        source, target = values[i], out[places[i]]
        for d in range(source.size):
            target[d] = widen(source[d])


def find_not_finite(values: NDArray[Any]) -> int:
    """Returns -1, or the first row of ``values`` [n, dim], float32 or float16, with infinity or NaN in it."""
    flat = values.reshape(-1)
    whole = flat.size * flat.itemsize // 8 * 8 // flat.itemsize
    masks = _HALF if flat.itemsize == 2 else _SINGLE
    if not _has_special(flat[:whole].view(np.uint64), *masks) and np.isfinite(flat[whole:]).all():
        return -1
    return int(np.argmin(np.isfinite(values).all(axis=1)))


@compiled
def _has_special(words: Words, sizes: np.uint64, step: np.uint64, signs: np.uint64) -> Any:
    found = np.uint64(0)
    for word in words:
        found |= ((word & sizes) + step) & signs
    return found != 0

"""Rows put in the order in which they travel, checked, and put back in their places, compiled by Numba.

Rows travel by the rank of their bucket, so that one shard's lie together, and by hash within a bucket. No two ids of a
table have the same hash: a frame in this order has each id once, which its reader sees in one pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.addresses import floats_at
from embeddings.kernels.compiled import compiled
from embeddings.kernels.hash_kernels import BUCKET_BITS, hash_of
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.sixteen_bit_kernels import widen
from embeddings.kernels.vectors import LANES, load, store_narrow

Longs = NDArray[np.int64]
Words = NDArray[np.uint64]

_AHEAD = 8  # rows that are asked for ahead
_BLOCK = 32  # rows that are written before they are looked at

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
    # Within a bucket, the next bits of hashes tell rows apart first, so that hardly any have to be compared.
    bits = 0
    while ends.size << (bits + 1) <= ids.size and bits < 8:
        bits += 1
    shift, mask = np.uint64(64 - BUCKET_BITS - bits), np.uint64((1 << bits) - 1)
    starts, places = np.zeros((ends.size << bits) + 1, np.int64), np.empty(ids.size, np.int64)
    for i in range(ids.size):
        leading = hash_of(ids[i], salt) >> shift
        places[i] = ranks[leading >> np.uint64(bits)] << bits | np.int64(leading & mask)
        starts[places[i] + 1] += 1
    for place in range(1, starts.size):
        starts[place] += starts[place - 1]
    for rank in range(ends.size):
        ends[rank] = starts[(rank + 1) << bits]
    nexts = starts.copy()
    for i in range(ids.size):
        hash = hash_of(ids[i], salt)
        # Each goes before those of larger hashes that came earlier.
        at, start = nexts[places[i]], starts[places[i]]
        while at > start and hashes[at - 1] >= hash:
            if hashes[at - 1] == hash:
                return i
            hashes[at], order[at] = hashes[at - 1], order[at - 1]
            at -= 1
        hashes[at], order[at] = hash, i
        nexts[places[i]] += 1
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


def gather_rows(values: NDArray[np.float32], order: Longs, out: NDArray[Any]) -> bool:
    """Writes row ``order[i]`` of ``values`` to row i of ``out``; says whether all is finite there.

    Args:
        values: [m, dim], contiguous.
        order: [n], of 0 to m - 1.
        out: [n, dim] float32 or float16, contiguous; written, rounded to nearest.
    """
    flat, masks = out.reshape(-1), _HALF if out.itemsize == 2 else _SINGLE
    whole = flat.size * flat.itemsize // 8 * 8 // flat.itemsize
    words, numbers = flat[:whole].view(np.uint64), flat.view(np.int16) if flat.itemsize == 2 else flat
    has_special = _gather(values.ctypes.data, len(values), values.shape[1], order, numbers, words, *masks)
    return not has_special and bool(np.isfinite(flat[whole:]).all())


@compiled
def _gather(
    values: int,
    rows: int,
    dim: int,
    order: Longs,
    out: Any,
    words: Words,
    sizes: np.uint64,
    step: np.uint64,
    signs: Any,
) -> Any:
    given, found = floats_at(values, rows * dim), np.uint64(0)  # an address: read-only arrays need no other kernel
    each, whole, seen = out.itemsize, dim - dim % LANES, 0
    for i in range(order.size):
        if i + _AHEAD < order.size:
            start = order[i + _AHEAD] * dim
            prefetch(given[start : start + dim])
        source, target = order[i] * dim, i * dim
        for d in range(0, whole, LANES):
            store_narrow(out, target + d, load(given, source + d))
        for d in range(whole, dim):
            store_narrow(out, target + d, given[source + d])
        if i % _BLOCK == _BLOCK - 1 or i == order.size - 1:  # what was written is in the nearest cache still
            end = min((target + dim) * each // 8, words.size)
            for place in range(seen, end):
                found |= ((words[place] & sizes) + step) & signs
            seen = end
    return found != 0


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

"""First values of single rows, compiled by Numba: those of ``initial_rows``, wherever in a table a row lies.

numpy's stream of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is drawn anew from
any position: four 64-bit numbers of one counter, each of which makes two float32, the lower half first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.addresses import multiply_high
from embeddings.kernels.compiled import inlined, unfused

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_ROUNDS = 10
_DRAWS_PER_COUNT = np.uint64(8)
_ONE, _ZERO = np.uint64(1), np.uint64(0)
_LOW_HALF = np.uint64(0xFFFFFFFF)


@inlined
def _philox(low: Any, high: Any, key0: Any, key1: Any) -> Any:
    # of the counter (low, high, 0, 0)
    c0, c1, c2, c3 = low, high, _ZERO, _ZERO
    for _ in range(_ROUNDS):
        high0, low0 = multiply_high(np.uint64(0xD2E7470EE14C6C93), c0), np.uint64(0xD2E7470EE14C6C93) * c0
        high1, low1 = multiply_high(np.uint64(0xCA5A826395121157), c2), np.uint64(0xCA5A826395121157) * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += np.uint64(0x9E3779B97F4A7C15)
        key1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@unfused
def draw_rows(ids: Longs, key0: np.uint64, key1: np.uint64, scale: np.float32, rows: Floats) -> None:
    """Draws the first values of rows, uniform in [-scale, scale).

    Args:
        ids: [n]; a negative one stands for 2 ** 64 more.
        key0: Of the table's stream.
        key1: The second half of it.
        scale: Half the interval's width.
        rows: [n, dim], written.
    """
    dim: Any = rows.shape[1]
    width = np.float32(2) * scale
    numbers = np.empty(8, np.uint32)
    for i in range(ids.size):
        row, id = rows[i], np.uint64(ids[i])
        # The first draw is number id * dim, of 128 bits.
        low, high = id * np.uint64(dim), multiply_high(id, np.uint64(dim))
        skipped = np.int64(low % _DRAWS_PER_COUNT)
        low = low >> np.uint64(3) | high << np.uint64(61)
        high >>= np.uint64(3)
        d = -skipped
        while d < dim:
            # numpy counts before it draws.
            low += _ONE
            high += np.uint64(low == 0)
            c0, c1, c2, c3 = _philox(low, high, key0, key1)
            numbers[0], numbers[1] = c0 & _LOW_HALF, c0 >> np.uint64(32)
            numbers[2], numbers[3] = c1 & _LOW_HALF, c1 >> np.uint64(32)
            numbers[4], numbers[5] = c2 & _LOW_HALF, c2 >> np.uint64(32)
            numbers[6], numbers[7] = c3 & _LOW_HALF, c3 >> np.uint64(32)
            for k in range(8):
                if 0 <= d + k < dim:
                    unit = np.float32(np.int32(numbers[k] >> np.uint32(8))) * np.float32(2.0**-24)
                    row[d + k] = width * unit - scale
            d += 8

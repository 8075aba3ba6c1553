"""Rows of 16 bits: to float32 when they are read, and rounded at random when they are written, compiled by Numba.

Rounded to nearest, an update smaller than half the distance to the next number would be lost each time; rounded up or
down in proportion, it is kept on average (Gupta et al. 2015, arXiv:1502.02551). The random numbers are a function of
the table, the update, and the place within the whole table, so that rows do not depend on threads or on the sharding.

A kernel takes bfloat16 rows as uint16 and float16 rows as int16, since Numba knows neither.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled

Floats = NDArray[np.float32]
Keys = NDArray[np.uint64]
Rows = NDArray[Any]  # float32, or 16 bits in uint16 or int16

_BFLOAT16, _FLOAT16 = types.uint16, types.int16


class Rounding(NamedTuple):
    """Which random numbers an update of a part rounds with."""

    stream: int  # 63 bits: another for each table, seed and update
    first_row: int  # of the part within its table
    first_column: int


def widen(number: Any) -> Any:
    """Gives a stored number as a float32, exactly; for kernels only."""
    raise NotImplementedError


@compiled
def _as_float(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@overload(widen, strict=False)
def _widen(number: Any) -> Any:
    if number == _BFLOAT16:
        return lambda number: _as_float(np.uint32(number) << np.uint32(16))
    if number == _FLOAT16:
        return lambda number: _widen_float16(np.uint32(np.uint16(number)))
    return lambda number: number


@compiled
def _widen_float16(bits: Any) -> Any:
    size, exponent = np.uint32(bits & np.uint32(0x7FFF)), np.uint32(bits & np.uint32(0x7C00))
    # The exponent's bias is 15 here and 127 there; all ones mean infinity or NaN in both.
    moved = np.uint32((size << np.uint32(13)) + np.uint32((127 - 15) << 23))
    if exponent == np.uint32(0x7C00):
        moved = np.uint32(moved | np.uint32(0x7F800000))
    wide = _as_float(moved)
    if exponent == np.uint32(0):
        wide = np.float32(np.int32(size)) * np.float32(2.0**-24)
    return -wide if bits & np.uint32(0x8000) else wide


@compiled
def _round_bfloat16(number: Any, random: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    # The lower half is what is cut off; adding a random number below 2**16 carries in proportion to it.
    carried = np.uint32(bits + np.uint32(random >> np.uint32(16)))
    if number != number:
        carried = np.uint32(bits | np.uint32(0x400000))
    return np.uint16(carried >> np.uint32(16))


@compiled
def _round_float16(number: Any, random: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    sign, size = np.uint32(bits >> np.uint32(16) & np.uint32(0x8000)), np.uint32(bits & np.uint32(0x7FFFFFFF))
    # As above with 13 bits, and the bias moved; what becomes too large is infinity.
    moved = np.uint32(size - np.uint32((127 - 15) << 23))
    rounded = np.uint32(np.uint32(moved + np.uint32(random >> np.uint32(19))) >> np.uint32(13))
    if rounded > np.uint32(0x7C00):
        rounded = np.uint32(0x7C00)
    if size < np.uint32((127 - 14) << 23):
        # Below the normal numbers lie multiples of 2**-24.
        scaled = _as_float(size) * np.float32(2.0**24)
        whole = np.int32(scaled)
        part = scaled - np.float32(whole)
        up = np.float32(np.int32(random >> np.uint32(8))) * np.float32(2.0**-24) < part
        rounded = np.uint32(whole + (1 if up else 0))
    if size > np.uint32(0x7F800000):
        rounded = np.uint32(0x7E00)
    return np.int16(np.uint16(sign | rounded))


def round_at_random(stored: Any, number: Any, random: Any) -> Any:
    """Gives a float32 in the type of ``stored``, up or down by 32 random bits; for kernels only."""
    raise NotImplementedError


@overload(round_at_random, strict=False)
def _round_at_random(stored: Any, number: Any, random: Any) -> Any:
    if stored == _BFLOAT16:
        return lambda stored, number, random: _round_bfloat16(number, random)
    return lambda stored, number, random: _round_float16(number, random)


@compiled
def _row_key(stream: Any, row: Any) -> Any:
    # The mixing steps of SplitMix64 (Steele, Lea and Flood 2014); the upper half is kept.
    key = np.uint64(stream) + (np.uint64(row) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ key >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ key >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.uint32((key ^ key >> np.uint64(31)) >> np.uint64(32))


@compiled
def _random_bits(key: Any, column: Any) -> Any:
    # The last steps of MurmurHash3 (Appleby): cheap, 32 bits wide, so that a register holds many.
    bits = np.uint32(key + np.uint32(column * np.uint32(0x9E3779B9)))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    bits = np.uint32(np.uint32(bits ^ np.uint32(bits >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))


@compiled
def widen_rows(weight: Rows, rows: Keys, held: Floats) -> None:
    """Copies rows of 16 bits into ``held`` [n, columns], as float32."""
    for i in range(rows.size):
        source, target = weight[rows[i]], held[i]
        for d in range(source.size):
            target[d] = widen(source[d])


@compiled
def round_rows(weight: Rows, rows: Keys, held: Floats, rounding: Rounding) -> None:
    """Writes rows back from ``held`` [n, columns], rounded up or down at random."""
    first_row, column = np.uint64(rounding.first_row), np.uint32(rounding.first_column)
    for i in range(rows.size):
        source, target = held[i], weight[rows[i]]
        key = _row_key(rounding.stream, first_row + rows[i])
        for d in range(target.size):
            random = _random_bits(key, np.uint32(column + np.uint32(d)))
            target[d] = round_at_random(target[d], source[d], random)


def borrow_rows(weight: Rows, rows: Keys, scratch: Floats) -> Any:
    """Gives float32 rows to update in place, and where in them each row is; for kernels only."""
    raise NotImplementedError


@overload(borrow_rows, strict=False)
def _borrow_rows(weight: Any, rows: Any, scratch: Any) -> Any:
    if weight.dtype == types.float32:
        return lambda weight, rows, scratch: (weight, rows)

    def borrow(weight: Rows, rows: Keys, scratch: Floats) -> Any:
        widen_rows(weight, rows, scratch)
        return scratch, np.arange(rows.size).astype(np.uint64)

    return borrow


def return_rows(weight: Rows, rows: Keys, scratch: Floats, rounding: Rounding) -> None:
    """Takes back what ``borrow_rows`` gave; for kernels only."""
    raise NotImplementedError


@overload(return_rows, strict=False)
def _return_rows(weight: Any, rows: Any, scratch: Any, rounding: Any) -> Any:
    if weight.dtype == types.float32:
        return lambda weight, rows, scratch, rounding: None
    return lambda weight, rows, scratch, rounding: round_rows(weight, rows, scratch, rounding)

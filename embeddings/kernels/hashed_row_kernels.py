"""Pull and push rows that an id map leads to, compiled by Numba: many ids a call, asked for ahead.

An update copies a block of rows and states from their records, runs the stages of ``fused_kernels`` on it in the
nearest cache, and copies it back: the same arithmetic as that of tables which lie in one piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.addresses import floats_at, halves_at
from embeddings.kernels.compiled import compiled, inlined
from embeddings.kernels.fused_kernels import run_block
from embeddings.kernels.hash_kernels import hash_of
from embeddings.kernels.id_map_kernels import AHEAD, Entries, find_slot, guess_slot
from embeddings.kernels.moment_kernels import take_gaps
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.record_kernels import counts_at, id_of, record_address, versions_at
from embeddings.kernels.sixteen_bit_kernels import widen
from embeddings.kernels.update_kernels import COW_CLIP, IDS, MEASURES, UpdateSettings
from embeddings.kernels.vectors import LANES, load, load_wide, store, store_narrow

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Values = NDArray[Any]  # float32, or float16 in int16

_BLOCK = 32  # rows that are updated from the nearest cache
_PUSH_AHEAD = 12


class Layout(NamedTuple):
    """Numbers per record: of the row, and of its first, second and third state, which follow one another."""

    dim: int
    first: int
    second: int
    last: int


@compiled
def pull_rows(
    entries: Entries,
    blocks: Longs,
    stride: int,
    salt: np.uint64,
    ids: Longs,
    dim: int,
    out: Values,
    missing: Longs,
) -> int:
    """Copies the row of each id.

    Args:
        entries: The map.
        blocks: Addresses of blocks.
        stride: Words per record.
        salt: Of hashes.
        ids: [n].
        dim: Numbers per row.
        out: Flat, n * dim; written but for missing rows.
        missing: [n], written: the places in ``ids`` of those that have no row.

    Returns:
        How many are missing.
    """
    mask, found, count = np.uint64(entries.size - 1), 0, ids.size
    hashes, slots = np.empty(count, np.uint64), np.empty(count, np.int64)
    for step in range(count + 2 * AHEAD):
        if step < count:
            hashes[step] = hash_of(ids[step], salt)
            place = hashes[step] & mask
            prefetch(entries[place : place + np.uint64(1)])
        i = step - AHEAD
        if 0 <= i < count:
            slots[i] = guess_slot(entries, hashes[i])
            if slots[i] >= 0:
                prefetch(floats_at(record_address(blocks, stride, slots[i]), stride))
        i = step - 2 * AHEAD
        if i >= 0:
            slot = slots[i]
            if slot >= 0 and id_of(blocks, stride, slot) != ids[i]:
                slot = find_slot(entries, blocks, stride, ids[i], hashes[i])
            if slot < 0:
                missing[found] = i
                found += 1
            else:
                _write_row(floats_at(record_address(blocks, stride, slot), dim), out, i * dim)
    return found


@inlined
def _write_row(row: Floats, out: Values, at: int) -> None:
    whole = row.size - row.size % LANES
    for d in range(0, whole, LANES):
        store_narrow(out, at + d, load(row, d))
    for d in range(whole, row.size):
        store_narrow(out, at + d, row[d])


@compiled
def push_rows(
    blocks: Longs,
    stride: int,
    slots: Longs,
    gradients: int,
    is_half: bool,
    counts: Longs,
    layout: Layout,
    settings: UpdateSettings,
    version: int,
    seen: int,
) -> None:
    """Updates the row of each slot once.

    Args:
        blocks: Addresses of blocks.
        stride: Words per record.
        slots: [n], each once.
        gradients: Where they begin, [n, dim]: an address, so that one kernel serves whatever is read-only or not.
        is_half: Whether they are float16, and not float32.
        counts: How many ids of the batch named each row, [n]; or empty: one.
        layout: Of records.
        settings: Of this update.
        version: That rows have from now on.
        seen: The time, in seconds.
    """
    dim, first, second, last = layout.dim, layout.first, layout.second, layout.last
    # Flat, since a view of a row would be counted, which takes as long as copying it.
    floats, halves = floats_at(gradients, slots.size * dim), halves_at(gradients, slots.size * dim)
    held, sums = np.empty(_BLOCK * dim, np.float32), np.empty(_BLOCK * dim, np.float32)
    state1, state2 = np.empty(_BLOCK * first, np.float32), np.empty(_BLOCK * second, np.float32)
    state3, measured = np.empty(_BLOCK * last, np.float32), np.empty((_BLOCK, MEASURES))
    places = np.arange(_BLOCK).astype(np.uint64)
    held_rows, sum_rows = _uncounted(held, dim), _uncounted(sums, dim)
    rows1, rows2, rows3 = _uncounted(state1, first), _uncounted(state2, second), _uncounted(state3, last)
    for i in range(min(_PUSH_AHEAD, slots.size)):
        prefetch(floats_at(record_address(blocks, stride, slots[i]), stride))
    for begin in range(0, slots.size, _BLOCK):
        used = min(_BLOCK, slots.size - begin)
        for k in range(used):
            i = begin + k
            if i + _PUSH_AHEAD < slots.size:
                prefetch(floats_at(record_address(blocks, stride, slots[i + _PUSH_AHEAD]), stride))
            record = floats_at(record_address(blocks, stride, slots[i]), stride)
            if is_half:
                _widen(halves, i * dim, sums, k * dim, dim)
            else:
                _copy(floats, i * dim, sums, k * dim, dim)
            _take_record(record, layout, k, held, state1, state2, state3)
            measured[k, IDS] = counts[i] if counts.size else 1
        at = places[:used]
        if settings.kind == COW_CLIP:
            take_gaps(at, rows3, measured, settings)
        run_block(held_rows, at, at, sum_rows, rows1, rows2, measured, settings)
        for k in range(used):
            slot = slots[begin + k]
            record = floats_at(record_address(blocks, stride, slot), stride)
            _put_record(record, layout, k, held, state1, state2, state3)
            _note_push(blocks, stride, slot, version, seen)


@inlined
def _take_record(
    record: Floats, layout: Layout, k: int, held: Floats, state1: Floats, state2: Floats, state3: Floats
) -> None:
    # into place k of a block
    dim, first, second, last = layout.dim, layout.first, layout.second, layout.last
    _copy(record, 0, held, k * dim, dim)
    _copy(record, dim, state1, k * first, first)
    _copy(record, dim + first, state2, k * second, second)
    _copy(record, dim + first + second, state3, k * last, last)


@inlined
def _put_record(
    record: Floats, layout: Layout, k: int, held: Floats, state1: Floats, state2: Floats, state3: Floats
) -> None:
    # back from there
    dim, first, second, last = layout.dim, layout.first, layout.second, layout.last
    _copy(held, k * dim, record, 0, dim)
    _copy(state1, k * first, record, dim, first)
    _copy(state2, k * second, record, dim + first, second)
    _copy(state3, k * last, record, dim + first + second, last)


@inlined
def _note_push(blocks: Longs, stride: int, slot: int, version: int, seen: int) -> None:
    versions_at(blocks, stride, slot)[0] = version
    number = counts_at(blocks, stride, slot)
    number[0] += np.uint32(1)
    number[1] = seen


@inlined
def _uncounted(numbers: Floats, width: int) -> Any:
    # [_BLOCK, width], of which views are free; ``numbers`` must live as long.
    return floats_at(numbers.ctypes.data, numbers.size).reshape(_BLOCK, width)


@inlined
def _widen(numbers: Values, start: int, wide: Floats, at: int, count: int) -> None:
    whole = count - count % LANES
    for d in range(0, whole, LANES):
        store(wide, at + d, load_wide(numbers, start + d))
    for d in range(whole, count):
        wide[at + d] = widen(numbers[start + d])


@inlined
def _copy(source: Floats, start: int, target: Floats, at: int, count: int) -> None:
    whole = count - count % LANES
    for d in range(0, whole, LANES):
        store(target, at + d, load(source, start + d))
    for d in range(whole, count):
        target[at + d] = source[start + d]

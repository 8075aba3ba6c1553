"""The map from ids to slots, compiled by Numba: open addressing with linear probing, many ids a call.

An entry is 64 bits: 32 of the id's hash, and the slot + 1; 0 is empty. The id itself stands in the slot's record, which
a reader wants anyway: so eight entries lie in a cache line, and an id that is present costs one line of the map.
Removal moves later entries of a run back instead of leaving a mark, so that runs stay as short as if the id had
never been there (Knuth, The Art of Computer Programming, volume 3, 6.4, algorithm R).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.addresses import floats_at, longs_at
from embeddings.kernels.compiled import compiled, inlined
from embeddings.kernels.hash_kernels import hash_of
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.record_kernels import FREE, id_of, record_address, versions_at

Longs = NDArray[np.int64]
Entries = NDArray[np.uint64]

AHEAD = 12  # how many ids ahead to ask for an entry, and after that for a record
_TAG_SHIFT = np.uint64(20)  # the last bits say where to look, the first ones the bucket
_SLOT_BITS = np.uint64(32)
_SLOT_MASK = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)


@inlined
def _tag(hash: Any) -> Any:
    return (hash >> _TAG_SHIFT) & _SLOT_MASK


@inlined
def _slot(entry: Any) -> Any:
    return np.int64(entry & _SLOT_MASK) - 1


@compiled
def guess_slot(entries: Entries, hash: np.uint64) -> Any:
    """Returns the first slot whose id has such a hash, most likely; -1: no id has it."""
    mask, tag = np.uint64(entries.size - 1), _tag(hash)
    place = hash & mask
    while True:
        entry = entries[place]
        if entry == 0:
            return -1
        if entry >> _SLOT_BITS == tag:
            return _slot(entry)
        place = (place + _ONE) & mask


@compiled
def find_slot(entries: Entries, blocks: Longs, stride: int, id: int, hash: np.uint64) -> Any:
    """Returns the slot of an id, or -1."""
    place = _find_place(entries, blocks, stride, id, hash)
    return _slot(entries[place])


@compiled
def _find_place(entries: Entries, blocks: Longs, stride: int, id: int, hash: np.uint64) -> np.uint64:
    # of the entry, or of the empty one where it would stand
    mask, tag = np.uint64(entries.size - 1), _tag(hash)
    place = hash & mask
    while True:
        entry = entries[place]
        if entry == 0:
            return place
        if entry >> _SLOT_BITS == tag and id_of(blocks, stride, (entry & _SLOT_MASK) - _ONE) == id:
            return place
        place = (place + _ONE) & mask


@compiled
def find_slots(entries: Entries, blocks: Longs, stride: int, salt: np.uint64, ids: Longs, slots: Longs) -> int:
    """Writes the slot of each id, or -1; returns how many have none."""
    mask, missing, count = np.uint64(entries.size - 1), 0, ids.size
    hashes = np.empty(count, np.uint64)
    for step in range(count + 2 * AHEAD):
        if step < count:
            hashes[step] = hash_of(ids[step], salt)
            place = hashes[step] & mask
            prefetch(entries[place : place + _ONE])
        i = step - AHEAD
        if 0 <= i < count:
            slots[i] = guess_slot(entries, hashes[i])
            if slots[i] >= 0:
                end = record_address(blocks, stride, slots[i]) + np.uint64(stride) * np.uint64(4)
                prefetch(longs_at(end - np.uint64(8), 1))
        i = step - 2 * AHEAD
        if i >= 0:
            if slots[i] >= 0 and id_of(blocks, stride, slots[i]) != ids[i]:
                slots[i] = find_slot(entries, blocks, stride, ids[i], hashes[i])
            missing += slots[i] < 0
    return missing


@compiled
def insert_ids(
    entries: Entries,
    blocks: Longs,
    stride: int,
    salt: np.uint64,
    ids: Longs,
    free: Longs,
    num_free: int,
    used: int,
    slots: Longs,
    new: NDArray[np.bool_],
) -> tuple[int, int]:
    """Gives each id a slot, one that it has or a record of zeros; entries and blocks have room for all.

    Args:
        entries: The map.
        blocks: Addresses of blocks.
        stride: Words per record.
        salt: Of hashes.
        ids: [n], any of them repeated.
        free: Slots that are free again, the last ``num_free`` first.
        num_free: How many.
        used: Slots that ever held a row.
        slots: [n], written.
        new: [n], written: whether it had no slot before, nor from an earlier place in ``ids``.

    Returns:
        ``num_free`` and ``used`` from now on.
    """
    mask = np.uint64(entries.size - 1)
    for i in range(ids.size):
        if i + AHEAD < ids.size:
            place = hash_of(ids[i + AHEAD], salt) & mask
            prefetch(entries[place : place + _ONE])
        hash = hash_of(ids[i], salt)
        place = _find_place(entries, blocks, stride, ids[i], hash)
        new[i] = entries[place] == 0
        if new[i]:
            if num_free > 0:
                num_free -= 1
                slot = free[num_free]
            else:
                slot = used
                used += 1
            entries[place] = _tag(hash) << _SLOT_BITS | np.uint64(slot + 1)
            record = floats_at(record_address(blocks, stride, slot), stride)
            record[:] = 0
            longs_at(record_address(blocks, stride, slot) + np.uint64(stride) * np.uint64(4) - np.uint64(8), 1)[0] = (
                ids[i]
            )
        slots[i] = _slot(entries[place])
    return num_free, used


@compiled
def remove_ids(
    entries: Entries, blocks: Longs, stride: int, salt: np.uint64, ids: Longs, free: Longs, num_free: int
) -> int:
    """Removes ids, where they are present, and appends their slots to ``free``; returns ``num_free`` from now on."""
    mask = np.uint64(entries.size - 1)
    for i in range(ids.size):
        hole = _find_place(entries, blocks, stride, ids[i], hash_of(ids[i], salt))
        if entries[hole] == 0:
            continue
        slot = _slot(entries[hole])
        versions_at(blocks, stride, slot)[0] = FREE
        free[num_free] = slot
        num_free += 1
        place = hole
        while True:
            place = (place + _ONE) & mask
            if entries[place] == 0:
                break
            home = hash_of(id_of(blocks, stride, (entries[place] & _SLOT_MASK) - _ONE), salt) & mask
            # It may move back to the hole unless that is before where a search for it begins.
            if (place - home) & mask >= (place - hole) & mask:
                entries[hole] = entries[place]
                hole = place
        entries[hole] = 0
    return num_free


@compiled
def fill_entries(entries: Entries, blocks: Longs, stride: int, salt: np.uint64, used: int) -> None:
    """Writes the entries of all rows into an empty map."""
    mask = np.uint64(entries.size - 1)
    for slot in range(used):
        if slot + 2 * AHEAD < used:
            prefetch(versions_at(blocks, stride, slot + 2 * AHEAD))
        if slot + AHEAD < used:
            place = hash_of(id_of(blocks, stride, slot + AHEAD), salt) & mask
            prefetch(entries[place : place + _ONE])
        if versions_at(blocks, stride, slot)[0] != FREE:
            hash = hash_of(id_of(blocks, stride, slot), salt)
            place = hash & mask
            while entries[place] != 0:
                place = (place + _ONE) & mask
            entries[place] = _tag(hash) << _SLOT_BITS | np.uint64(slot + 1)

"""Records of rows in blocks of memory, compiled by Numba: where they lie, and how they are copied in and out.

A record is ``stride`` float32 words: what a caller keeps, then ``count`` and ``seen`` (uint32), ``version`` and ``id``
(int64). Slot ``s`` is number ``s % 65536`` of block ``s // 65536``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.addresses import floats_at, longs_at, words_at
from embeddings.kernels.compiled import compiled, inlined
from embeddings.kernels.hash_kernels import bucket_of
from embeddings.kernels.prefetch import prefetch

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

BLOCK_BITS = 16
BLOCK_RECORDS = 1 << BLOCK_BITS
ID_WORDS = 2
META_WORDS = 4  # count, seen, version
COUNT, SEEN, VERSION = 0, 1, 2  # places among them
FREE = -1  # version of a slot that holds no row
_AHEAD = 8


@inlined
def record_address(blocks: Any, stride: Any, slot: Any) -> Any:
    """Returns where the record of a slot begins."""
    within = np.uint64(slot) & np.uint64(BLOCK_RECORDS - 1)
    return np.uint64(blocks[np.uint64(slot) >> np.uint64(BLOCK_BITS)]) + within * np.uint64(stride) * np.uint64(4)


@inlined
def id_of(blocks: Any, stride: Any, slot: Any) -> Any:
    """Returns the id in a slot."""
    return longs_at(record_address(blocks, stride, slot) + np.uint64(stride) * np.uint64(4) - np.uint64(8), 1)[0]


@inlined
def versions_at(blocks: Any, stride: Any, slot: Any) -> Any:
    """Returns the version in a slot, as an array of one."""
    return longs_at(record_address(blocks, stride, slot) + np.uint64(stride) * np.uint64(4) - np.uint64(16), 1)


@inlined
def counts_at(blocks: Any, stride: Any, slot: Any) -> Any:
    """Returns count and seen in a slot, as an array of two."""
    return words_at(record_address(blocks, stride, slot) + np.uint64(stride) * np.uint64(4) - np.uint64(24), 2)


@inlined
def _prefetch_words(blocks: Any, stride: Any, slot: Any, first: Any, count: Any) -> Any:
    prefetch(floats_at(record_address(blocks, stride, slot) + np.uint64(first) * np.uint64(4), count))


@compiled
def read_records(blocks: Longs, stride: int, slots: Longs, first: int, out: Floats) -> None:
    """Copies words ``first`` and on of the records in slots [n] into ``out`` [n, words]."""
    for i in range(slots.size):
        if i + _AHEAD < slots.size:
            _prefetch_words(blocks, stride, slots[i + _AHEAD], first, out.shape[1])
        record, target = floats_at(record_address(blocks, stride, slots[i]), stride), out[i]
        for d in range(target.size):
            target[d] = record[first + d]


@compiled
def write_records(blocks: Longs, stride: int, slots: Longs, first: int, rows: Floats) -> None:
    """Copies ``rows`` [n, words] over words ``first`` and on of the records in slots [n]."""
    for i in range(slots.size):
        if i + _AHEAD < slots.size:
            _prefetch_words(blocks, stride, slots[i + _AHEAD], first, rows.shape[1])
        record, source = floats_at(record_address(blocks, stride, slots[i]), stride), rows[i]
        for d in range(source.size):
            record[first + d] = source[d]


@compiled
def read_ids(blocks: Longs, stride: int, slots: Longs, ids: Longs) -> None:
    """Writes the id in each slot."""
    for i in range(slots.size):
        ids[i] = id_of(blocks, stride, slots[i])


@compiled
def list_slots(
    blocks: Longs, stride: int, used: int, since: int, wanted: NDArray[np.bool_], salt: np.uint64, slots: Longs
) -> int:
    """Lists slots that hold a row which changed after a version and is in a wanted bucket.

    Args:
        blocks: Their addresses.
        stride: Words per record.
        used: Slots that ever held a row.
        since: The version.
        wanted: [4096], or empty: all buckets.
        salt: Of the buckets.
        slots: [used], written.

    Returns:
        How many.
    """
    found = 0
    for slot in range(used):
        if versions_at(blocks, stride, slot)[0] > since and (
            wanted.size == 0 or wanted[bucket_of(id_of(blocks, stride, slot), salt)]
        ):
            slots[found] = slot
            found += 1
    return found

"""Hashes of ids, compiled by Numba: which bucket of 4,096 a row is in, and where an id map looks for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled, inlined

BUCKET_BITS = 12
NUM_BUCKETS = 1 << BUCKET_BITS


@inlined
def mix(number: Any) -> Any:
    """Mixes the bits of a uint64, one to one (SplitMix64's finalizer; Steele, Lea and Flood 2014)."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@inlined
def hash_of(id: Any, salt: Any) -> Any:
    """Returns the hash of an id, 64 bits: the first ones say its bucket, an id map uses the others."""
    return mix((np.uint64(id) ^ salt) + np.uint64(0x9E3779B97F4A7C15))


@inlined
def bucket_of(id: Any, salt: Any) -> Any:
    """Returns the bucket of an id: the first bits of its hash, so that an id map may use the last ones."""
    return hash_of(id, salt) >> np.uint64(64 - BUCKET_BITS)


@compiled
def draw_chances(ids: NDArray[np.int64], counts: NDArray[np.uint32], key: np.uint64, out: NDArray[np.float64]) -> None:
    """Writes a number in [0, 1) for each id and count, a function of both.

    Args:
        ids: [n].
        counts: [n].
        key: Sets the numbers apart from others'.
        out: [n], written.
    """
    for i in range(ids.size):
        out[i] = np.float64(mix(hash_of(ids[i], key) + np.uint64(counts[i])) >> np.uint64(11)) * 2.0**-53


@compiled
def find_buckets(ids: NDArray[np.int64], salt: np.uint64, buckets: NDArray[np.uint16]) -> None:
    """Writes the bucket of each id.

    Args:
        ids: [n].
        salt: Of the table, so that popular ids of different tables lie in different buckets.
        buckets: [n], written.
    """
    for i in range(ids.size):
        buckets[i] = bucket_of(ids[i], salt)

"""Which shard holds which row: a hash puts each row into one of 4,096 buckets, and routes say where buckets lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS, find_buckets

Longs = NDArray[np.int64]
Buckets = NDArray[np.uint16]


def salt_of(table: str) -> np.uint64:
    """Gives a table's salt: a function of its name alone, so that other tables may come and go."""
    return np.uint64(xxhash.xxh64_intdigest(table.encode()))


def buckets_of(ids: Longs, salt: np.uint64) -> Buckets:
    """Gives the bucket of each id [n] of a table."""
    buckets = np.empty(ids.size, np.uint16)
    find_buckets(ids, salt, buckets)
    return buckets


@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """Where buckets lie.

    Attributes:
        epoch: Grows with every change.
        owners: [4096] int32: the number of each bucket's shard.
        addresses: Of shards, by number: ``host:port``, ``unix:/path``, or ``local:<n>`` within this process.
    """

    epoch: int
    owners: NDArray[np.int32]
    addresses: Mapping[int, str]

    def __post_init__(self) -> None:
        if self.owners.shape != (NUM_BUCKETS,):
            raise ValueError(f"routes: expected an owner of each of {NUM_BUCKETS} buckets, got {self.owners.shape}")
        if unknown := set(np.unique(self.owners).tolist()) - set(self.addresses):
            raise ValueError(f"routes: expected addresses of all shards, got none of shard {min(unknown)}")

    def owned_by(self, shard: int) -> NDArray[np.bool_]:
        """Says of each bucket whether a shard holds it."""
        mine: NDArray[np.bool_] = self.owners == shard
        return mine


def spread_evenly(shards: Sequence[int]) -> NDArray[np.int32]:
    """Gives each shard as many buckets as the next, give or take one: [4096] owners."""
    places = np.arange(NUM_BUCKETS) * len(shards) // NUM_BUCKETS
    return np.asarray(shards, np.int32)[places]

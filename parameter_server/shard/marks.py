"""Which pushes a bucket has seen: a mark per lane and bucket, so that a chunk computed twice is applied once.

The mark is the stamp of the lane's last push that was applied to the bucket. Stamps of a bucket's pushes grow, and all
rows of one push that lie in one bucket come in one frame: what is not above the mark has been applied.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.hash_kernels import NUM_BUCKETS, bucket_of
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of
from parameter_server.wire import Longs

ELSEWHERE, HERE, FROZEN = 0, 1, 2
Places = NDArray[np.uint8]
"""[4096]: of each bucket one of the three."""
FROZEN_RETRY_SECONDS = 0.05  # after which a sender asks again for a bucket that is about to move
_NONE = np.zeros(NUM_BUCKETS, np.int64)


class Fresh(NamedTuple):
    """What of a push is new."""

    buckets: NDArray[np.uint16]  # [n], of each id
    rows: NDArray[np.bool_] | None  # [n], of each id whether it is new; None: all are
    skipped: int


class Marks:
    """The marks of all lanes that have pushed to a shard.

    Attributes:
        lanes: Of each lane [4096] int64: the stamp of the bucket's last push, 0 before the first.
        changed: Lanes whose marks have changed since somebody last cleared it.
    """

    def __init__(self) -> None:
        self.lanes: dict[int, Longs] = {}
        self.changed: set[int] = set()

    def find_fresh(self, lane: int, stamp: int, ids: Longs, salt: np.uint64, places: Places) -> Fresh:
        """Finds which rows of a push are new; changes nothing.

        Raises:
            RefusedError: A row's bucket is elsewhere, or is about to be.
        """
        buckets = np.empty(ids.size, np.uint16)
        skipped, elsewhere, frozen = _find_buckets(ids, salt, places, self.lanes.get(lane, _NONE), stamp, buckets)
        if elsewhere >= 0:
            raise _moved(int(buckets[elsewhere]))
        if frozen >= 0:
            raise _frozen(int(buckets[frozen]))
        return Fresh(buckets, self.of(lane)[buckets] < stamp if skipped else None, skipped)

    def set(self, lane: int, stamp: int, fresh: Fresh) -> None:
        """Marks the buckets of a push's new rows."""
        if len(fresh.buckets) > fresh.skipped:
            _set_marks(fresh.buckets if fresh.rows is None else fresh.buckets[fresh.rows], stamp, self.of(lane))
            self.changed.add(lane)

    def raise_to(self, lane: int, buckets: Longs, marks: Longs) -> None:
        """Takes over marks [n] of some buckets [n] from elsewhere, where they are higher."""
        own = self.of(lane)
        own[buckets] = np.maximum(own[buckets], marks)
        self.changed.add(lane)

    def clear(self, buckets: NDArray[np.bool_]) -> None:
        """Forgets the marks of buckets [4096]."""
        for lane, marks in self.lanes.items():
            marks[buckets] = 0
            self.changed.add(lane)

    def of(self, lane: int) -> Longs:
        """Gives the marks of a lane, [4096], to be changed in place."""
        if lane not in self.lanes:
            self.lanes[lane] = np.zeros(NUM_BUCKETS, np.int64)
        return self.lanes[lane]


def check_places(ids: Longs, salt: np.uint64, places: Places) -> None:
    """Checks that all rows to be read are here; what is about to move is still right here.

    Raises:
        RefusedError: A row's bucket is elsewhere.
    """
    bucket = _find_elsewhere(ids, salt, places)
    if bucket >= 0:
        raise _moved(bucket)


def check_not_frozen(ids: Longs, salt: np.uint64, places: Places) -> None:
    """Checks that no row to be changed is about to move.

    Raises:
        RefusedError: With UNAVAILABLE: one is.
    """
    buckets = buckets_of(ids, salt)
    if (frozen := buckets[places[buckets] == FROZEN]).size:
        raise _frozen(int(frozen[0]))


def _frozen(bucket: int) -> RefusedError:
    message = f"bucket {bucket} is about to move: send again a little later"
    return RefusedError(Refusal.UNAVAILABLE, message, retry_after_seconds=FROZEN_RETRY_SECONDS)


def _moved(bucket: int) -> RefusedError:
    message = f"moved: bucket {bucket} is not on this shard: get newer routes"
    return RefusedError(Refusal.FAILED_PRECONDITION, message, moved=True)


@compiled
def _find_buckets(
    ids: Longs, salt: np.uint64, places: Places, marks: Longs, stamp: int, buckets: NDArray[np.uint16]
) -> tuple[int, int, int]:
    """Writes the bucket of each id [n]; returns how many are marked, and the first id elsewhere and frozen, or -1."""
    marked, elsewhere, frozen = 0, -1, -1
    for i in range(ids.size):
        bucket = bucket_of(ids[i], salt)
        buckets[i] = bucket
        marked += marks[bucket] >= stamp
        if places[bucket] != HERE:
            if places[bucket] == ELSEWHERE:
                return marked, i, frozen
            frozen = i
    return marked, elsewhere, frozen


@compiled
def _set_marks(buckets: NDArray[np.uint16], stamp: int, marks: Longs) -> None:
    for bucket in buckets:
        marks[bucket] = stamp


@compiled
def _find_elsewhere(ids: Longs, salt: np.uint64, places: Places) -> int:
    """Returns the first bucket among those of the ids [n] that is elsewhere, or -1."""
    for i in range(ids.size):
        bucket = bucket_of(ids[i], salt)
        if places[bucket] == ELSEWHERE:
            return int(bucket)
    return -1

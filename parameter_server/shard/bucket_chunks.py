"""Buckets on their way to another shard: chunks of a few megabytes, each a part of a state, see ``state_parts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from parameter_server.shard.folder import PART_BYTES, Busy
from parameter_server.shard.replay import group_buckets
from parameter_server.shard.state import ShardState
from parameter_server.shard.state_parts import (
    Part,
    cut_dense,
    cut_marks,
    cut_rows,
    pack_part,
    row_bytes,
    take_clocks,
    take_dense,
    take_evicted,
    take_marks,
    take_rows,
)

CHUNK_BYTES = (4 << 20) - (256 << 10)  # of arrays; names and a row more than fits leave a chunk below 4 MiB
Mask = NDArray[np.bool_]


def take_chunks(state: ShardState, busy: Busy, buckets: Mask, since: Sequence[int]) -> Iterator[bytes]:
    """Gives all that lies in buckets, or of rows what changed there after versions of the tables.

    The lock is taken for moments. Marks, clocks and pieces come whole each time, last of all: once pushes to the
    buckets are refused, a pass since the versions before the pass before makes the other shard's copy exact.
    """
    if any(since):
        with busy():
            part = take_evicted(state, since, buckets)
        if part:
            yield pack_part(part)
    for number, version in enumerate(since):
        share = buckets.mean() * row_bytes(state.tables[number])
        for group in group_buckets(1 + int(share) // PART_BYTES):
            with busy():
                part = take_rows(state, number, version, buckets & group)
            yield from map(pack_part, cut_rows(part, CHUNK_BYTES))
    with busy():
        clocks, marks = take_clocks(state), take_marks(state, sorted(state.marks.lanes), buckets)
        dense = take_dense(state, buckets)
    rest: list[Iterator[Part]] = [iter([clocks]), cut_marks(marks, CHUNK_BYTES), cut_dense(dense, CHUNK_BYTES)]
    for parts in rest:
        yield from map(pack_part, parts)

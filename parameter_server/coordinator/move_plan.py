"""Which buckets should move where, so that shards hold equally many and those being drained none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS


@dataclass(frozen=True, kw_only=True, eq=False)
class Move:
    """Some buckets on their way.

    Attributes:
        sender: Number of the shard that has them.
        receiver: Number of the one that gets them.
        buckets: [4096] bool.
        members: Numbers of both as members: a shard that is started anew has another one.
    """

    sender: int
    receiver: int
    buckets: NDArray[np.bool_]
    members: tuple[int, int] = (0, 0)


def plan_move(owners: NDArray[np.int32], receivers: Sequence[int], portion: int) -> Move | None:
    """Gives the next move, or None where nothing has to move.

    A shard that is to hold nothing is emptied first; else the fullest one gives to the emptiest, as long as they differ
    by more than one bucket. No bucket moves twice.

    Args:
        owners: [4096] numbers of shards.
        receivers: Shards that may hold buckets.
        portion: Most buckets to move at a time.
    """
    if not receivers:
        return None
    held = {shard: int((owners == shard).sum()) for shard in {*receivers, *np.unique(owners).tolist()}}
    emptiest = min(receivers, key=lambda shard: (held[shard], shard))
    leaving = [shard for shard in held if shard not in receivers and held[shard]]
    if leaving:
        sender = min(leaving)
        room = max(1, NUM_BUCKETS // len(receivers) - held[emptiest])
        count = min(held[sender], room)
    else:
        sender = max(receivers, key=lambda shard: (held[shard], -shard))
        share = NUM_BUCKETS // len(receivers)
        count = min(held[sender] - share, share - held[emptiest])
        if count <= 0:  # what does not divide evenly
            count = int(held[sender] - held[emptiest] > 1)
    count = min(count, portion)
    if count <= 0:
        return None
    buckets = np.zeros(NUM_BUCKETS, np.bool_)
    buckets[np.flatnonzero(owners == sender)[-count:]] = True
    return Move(sender=sender, receiver=emptiest, buckets=buckets)

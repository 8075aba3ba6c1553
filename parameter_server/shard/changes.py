"""What a shard says of a table to those who follow it: rows that have changed, and rows that are gone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parameter_server.wire import Longs

Floats = NDArray[np.float32]


class Changes(NamedTuple):
    """What a shard says of a table at one moment.

    Attributes:
        version: Of the table.
        route_epoch: Of the shard's routes.
        claims: [4096] the epoch of routes since which each bucket's rows are whole here; 0 where they are not.
        num_rows: In the table, of all buckets.
        ids: [n] rows of the asked-for buckets that changed since the asked-for version.
        weights: [n, dim].
        evicted: Ids of rows that went since, and did not come back.
        evictions_since: The version since which it is known which rows went.
    """

    version: int
    route_epoch: int
    claims: Longs
    num_rows: int
    ids: Longs
    weights: Floats
    evicted: Longs
    evictions_since: int = 0

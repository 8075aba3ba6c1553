"""What users did, in their order: the form that every source of sequences is brought into before it is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlrm.data.dataset import Array, IntArray

ITEM = "item"
"""The name of the items' table, and of the feature that looks it up."""
PAD = 0
"""The id of no item: it stands for one that is hidden, and by itself for a history of nothing."""


@dataclass(frozen=True, kw_only=True)
class SequenceData:
    """The actions of all users; those of user u are actions[offsets[u] : offsets[u + 1]], the oldest first.

    Attributes:
        users: [num_users], names.
        items: [num_items], names; the item of id i is items[i - 1].
        offsets: [num_users + 1] int64.
        actions: [num_actions], ids of items, 1 ... num_items.
        times: [num_actions] int64 or float64, ascending for each user; None where only the order is known.
        places: [num_users], file and line of each; None where a user has no line of their own.
    """

    users: pa.LargeStringArray
    items: pa.LargeStringArray
    offsets: IntArray
    actions: IntArray
    times: Array | None = None
    places: Sequence[tuple[Path, int]] | None = None

    @property
    def num_items(self) -> int:
        """Items of the catalogue; PAD is none of them."""
        return len(self.items)

    @property
    def lengths(self) -> IntArray:
        """[num_users], actions of each."""
        return np.diff(self.offsets)

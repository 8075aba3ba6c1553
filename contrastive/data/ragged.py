"""Histories of different lengths as two flat arrays, and the few moves on them that need no loop."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dlrm.data.dataset import IntArray


class Ragged(NamedTuple):
    """Lists, one after the other: `items` [T] of all, `lengths` [B] of each."""

    items: IntArray
    lengths: IntArray

    @property
    def firsts(self) -> IntArray:
        """[B], where each list begins in `items`."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, lists: IntArray) -> Ragged:
        """Return the lists at these numbers."""
        lengths = self.lengths[lists]
        return Ragged(self.items[spans(self.firsts[lists], lengths)], lengths)

    def filled(self, item: int) -> Ragged:
        """Return the lists with an item in each that was empty."""
        empty = self.lengths == 0
        return Ragged(np.insert(self.items, self.firsts[empty], item), self.lengths + empty) if empty.any() else self


def spans(firsts: IntArray, counts: IntArray) -> IntArray:
    """Return the numbers firsts[i], firsts[i] + 1, ... (counts[i] of them) for every i, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)

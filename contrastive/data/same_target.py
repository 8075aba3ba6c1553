"""Finds other samples with the same target, which DuoRec (Qiu et al. 2022) takes for views of one another."""

from __future__ import annotations

import numpy as np

from contrastive.augment.draws import Draws
from contrastive.data.sequence_dataset import SequenceDataset
from dlrm.data.dataset import IntArray


class SameTarget:
    """The samples of a split, by their targets.

    Args:
        dataset: the sequences.
        split: whose samples; 20 bytes of memory for each.
    """

    def __init__(self, dataset: SequenceDataset, split: str) -> None:
        targets = dataset.targets(split, np.arange(dataset.rows(split)))
        self._counts = np.bincount(targets, minlength=dataset.num_items + 1)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._order = np.argsort(targets, kind="stable")
        self._rank = np.empty_like(self._order)
        self._rank[self._order] = np.arange(len(self._order))

    def draw(self, rows: IntArray, targets: IntArray, draws: Draws) -> IntArray:
        """Return for each sample another one with its target, all equally likely; itself where there is no other."""
        firsts, others = self._firsts[targets], self._counts[targets] - 1
        drawn = draws.below(others, 0)
        own = self._rank[rows] - firsts
        drawn = np.where(others > 0, drawn + (drawn >= own), own)
        found: IntArray = self._order[firsts + drawn]
        return found

"""The exact area under the ROC curve from sorted keys, over all rows and within segments, in whole numbers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dlrm.metrics.score_keys import CHUNK_ROWS, Keys, TieGroups, tie_groups


@dataclass(frozen=True)
class RankSum:
    """What rows of one segment, in ascending order of score, say about its AUC (the Mann-Whitney statistic)."""

    segment: int
    positives: int
    negatives: int
    twice_wins: int
    """Twice the pairs in which a positive scores above a negative, where a tie counts half."""
    prediction_sum: float

    @property
    def samples(self) -> int:
        """Rows of the segment."""
        return self.positives + self.negatives

    @property
    def auc(self) -> float:
        """Chance that a positive scores above a negative, a tie counting half; NaN with one class only."""
        pairs = self.positives * self.negatives
        return self.twice_wins / (2 * pairs) if pairs else math.nan

    def then(self, other: RankSum) -> RankSum:
        """Join with rows of the same segment that all have higher scores."""
        return RankSum(
            self.segment,
            self.positives + other.positives,
            self.negatives + other.negatives,
            self.twice_wins + other.twice_wins + 2 * other.positives * self.negatives,
            self.prediction_sum + other.prediction_sum,
        )


def rank_sums(groups: TieGroups, limit: int | None = None) -> list[RankSum]:
    """Return the sums of the segments in ``groups``, in their order.

    With ``limit``, the first and the last (which may go on elsewhere) and the ``limit`` largest of the others.
    """
    first = np.flatnonzero(np.concatenate(([True], groups.segments[1:] != groups.segments[:-1])))
    below = np.cumsum(groups.negatives) - groups.negatives
    below -= np.repeat(below[first], np.diff(first, append=len(below)))
    positives = np.add.reduceat(groups.positives, first)
    negatives = np.add.reduceat(groups.negatives, first)
    twice_wins = np.add.reduceat(groups.positives * (2 * below + groups.negatives), first)
    predictions = np.add.reduceat(groups.probabilities * groups.counts, first)
    chosen = np.arange(len(first))
    if limit is not None and len(first) > limit + 2:
        largest = np.argsort(-(positives + negatives)[1:-1], kind="stable")[:limit] + 1
        chosen = np.sort(np.concatenate(([0], largest, [len(first) - 1])))
    columns = (groups.segments[first], positives, negatives, twice_wins, predictions)
    return [RankSum(*row) for row in zip(*(column[chosen].tolist() for column in columns), strict=True)]


def largest_segments(keys: Keys, limit: int, chunk_rows: int = CHUNK_ROWS) -> list[RankSum]:
    """Return the ``limit`` segments with most rows, largest first, from sorted keys."""
    best: list[RankSum] = []
    for found in _segments(keys, limit, chunk_rows):
        best = heapq.nlargest(limit, best + found, key=lambda s: (s.samples, -s.segment))
    return best


def _segments(keys: Keys, limit: int, chunk_rows: int) -> Iterator[list[RankSum]]:
    """Yield the segments that end in each chunk, without those that cannot be among the ``limit`` largest."""
    held: RankSum | None = None
    for groups in tie_groups(keys, chunk_rows):
        found = rank_sums(groups, limit)
        if held is not None and held.segment == found[0].segment:
            found[0] = held.then(found[0])
        elif held is not None:
            found.insert(0, held)
        held = found.pop()
        yield found
    if held is not None:
        yield [held]

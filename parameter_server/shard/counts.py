"""What a shard has done so far, in numbers: for metrics, for reports, and to prove what was lost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

STALENESS_BINS = 33


@dataclass
class ShardCounts:
    """Counts since the shard's process began, but for those that say otherwise.

    Attributes:
        pulls: Frames answered.
        pulled_rows: Their rows.
        pulled_bytes: Of the answers.
        pushes: Frames applied; duplicates, and those that tell of a clock and have no rows, left out.
        pushed_rows: Rows of those that were applied.
        pushed_bytes: Of those frames.
        skipped_rows: Rows of pushes that had been applied before, under another lease.
        duplicates: Frames that came again.
        refused: Messages of pushes or dense pieces of which something was refused, once they were found well-formed.
        lost_pushes: Frames acknowledged since the run began that are not in the tables, as a crash took them.
        replayed: Records of the journal that were applied at the start.
        torn_bytes: Cut off the journal's end at the start: a record that was never acknowledged.
        journal_bytes: Appended.
        journal_syncs: How often the journal was synced.
        journal_sync_seconds: For all of these.
        evicted_rows: That went by age, by number, or for want of room.
        snapshots: Taken.
        snapshot_seconds: Of the last one, from its beginning to its end.
        snapshot_pause_seconds: The longest time that the last snapshot kept pushes waiting at a stretch.
        longest_pause_seconds: Of all snapshots.
        dense_calls: Of the dense part.
        lock_seconds: For which the shard was busy with pulls and pushes.
        staleness_sum: Of all pushes, how many others their table had seen since the pull.
        staleness: [tables, bins]: of pushes, how many others the table had seen between the pull that a gradient was
            computed from and the push: none in bin 0, [2**(i-1), 2**i) in bin i.
    """

    pulls: int = 0
    pulled_rows: int = 0
    pulled_bytes: int = 0
    pushes: int = 0
    pushed_rows: int = 0
    pushed_bytes: int = 0
    skipped_rows: int = 0
    duplicates: int = 0
    refused: int = 0
    lost_pushes: int = 0
    replayed: int = 0
    torn_bytes: int = 0
    journal_bytes: int = 0
    journal_syncs: int = 0
    journal_sync_seconds: float = 0.0
    evicted_rows: int = 0
    snapshots: int = 0
    snapshot_seconds: float = 0.0
    snapshot_pause_seconds: float = 0.0
    longest_pause_seconds: float = 0.0
    dense_calls: int = 0
    lock_seconds: float = 0.0
    staleness_sum: int = 0
    staleness: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, STALENESS_BINS), np.int64))

    def count_staleness(self, table: int, now: int, pulled: int) -> None:
        """Takes down the versions that a table has at a push, and had at its pull."""
        # After a crash a table may have a lower version than some trainer has seen.
        others = max(0, now - pulled)
        self.staleness_sum += others
        self.staleness[table, min(others.bit_length(), STALENESS_BINS - 1)] += 1

    def copy(self) -> ShardCounts:
        """Gives the counts as they are now; beside pushes, they may be of moments apart."""
        return replace(self, staleness=self.staleness.copy())

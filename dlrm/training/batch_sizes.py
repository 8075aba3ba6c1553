"""How many samples a step takes, as a function of the samples before it: what is decided once holds on every resume."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from dlrm.data.read_ahead import AHEAD

# Batches that may have been cut when a step ends: those of the reader, the next one, and one on its way to a GPU.
CUT_AHEAD = AHEAD + 2


class BatchSizes:
    """A size and its later changes.

    Args:
        first: samples per step at the beginning, over all ranks.
    """

    def __init__(self, first: int) -> None:
        self._changes: list[tuple[int, int]] = [(0, first)]

    def at(self, samples: int) -> int:
        """Return the size of the step that begins after so many samples."""
        return self._changes[bisect_right(self._changes, samples, key=lambda change: change[0]) - 1][1]

    def change(self, size: int, *, from_samples: int) -> None:
        """Take another size in all steps that begin at `from_samples` or later, and forget what was to change later."""
        self._changes = [change for change in self._changes if change[0] < from_samples]
        if not self._changes or self._changes[-1][1] != size:
            self._changes.append((from_samples, size))

    def change_after(self, size: int, samples: int) -> int:
        """Take another size as soon after `samples` as no batch has been cut; return from where on.

        Args:
            size: the new one.
            samples: all up to the end of the step that has just been taken.
        """
        from_samples = samples + CUT_AHEAD * self.at(samples)
        self.change(size, from_samples=from_samples)
        return from_samples

    def state(self) -> list[tuple[int, int]]:
        """Return all changes as (from sample, size); the first is the size at the beginning."""
        return list(self._changes)

    def load_state(self, state: Sequence[Sequence[int]]) -> None:
        """Go on from what `state` returned."""
        self._changes = [(int(samples), int(size)) for samples, size in state]

"""Bounded staleness: nobody is further ahead of the slowest living trainer than the run allows.

Stale synchronous parallel (Ho et al. 2013): a trainer that has done ``c`` batches begins the next one when all others
have done at least ``c - staleness``. One that dies, or has no data, does not hold the others back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Runner:
    base: int  # added to its own count: who comes late starts level with the slowest
    clock: int
    counts: bool = True

    @property
    def place(self) -> int:
        return self.base + self.clock


class Gate:
    """The clocks of the living trainers; a clock is the number of batches that a trainer itself has done.

    A trainer counts from the first time it stands at the gate until it leaves, dies or has no data.

    Args:
        staleness: Batches that one may be ahead of the slowest; None: any number.
    """

    def __init__(self, staleness: int | None) -> None:
        self._staleness = staleness
        self._runners: dict[int, _Runner] = {}

    def enter(self, member: int, clock: int) -> None:
        """Notes how many batches a trainer has done; a smaller number than before is an old message.

        The first time it is put level with the slowest, and after a pause too, where it has fallen behind: its own
        count need not begin at 0.
        """
        slowest, runner = self._slowest(), self._runners.get(member)
        if runner is None:
            runner = self._runners[member] = _Runner((slowest or 0) - clock, clock)
        runner.clock = max(runner.clock, clock)
        if not runner.counts:
            runner.counts = True
            if slowest is not None and runner.place < slowest:
                runner.base = slowest - runner.clock

    def pause(self, member: int) -> None:
        """Stops counting a trainer, which has nothing to compute, until it enters again."""
        if runner := self._runners.get(member):
            runner.counts = False

    def leave(self, member: int) -> None:
        """Forgets a trainer: it left, or died."""
        self._runners.pop(member, None)

    def is_open(self, member: int) -> bool:
        """Says whether a trainer may begin its next batch."""
        slowest, runner = self._slowest(), self._runners.get(member)
        if self._staleness is None or slowest is None or runner is None:
            return True
        return runner.place - self._staleness <= slowest

    def _slowest(self) -> int | None:
        return min((runner.place for runner in self._runners.values() if runner.counts), default=None)

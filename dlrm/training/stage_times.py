"""Where the time of a step goes, over all ranks: shares since the last look, and which of them need not be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embeddings.stopwatch import Stopwatch

if TYPE_CHECKING:
    from dlrm.distributed.ranks import Ranks

WAITING_FOR_DATA = "waiting for data"
OUTSIDE_TRAINING = ("evaluation", "checkpoint")  # what a run's `seconds` leave out
OTHER_STAGE = "rest of the loop"
STAGES = (
    WAITING_FOR_DATA,
    *("ids all-to-all", "lookup", "rows all-to-all", "dense forward"),
    *("dense backward", "gradients all-to-all", "row update", "exposed all-reduce", "dense update"),
    *OUTSIDE_TRAINING,
)
# What a rank spends on others rather than on its samples; all else is work that somebody has to do.
AVOIDABLE = (WAITING_FOR_DATA, "ids all-to-all", "rows all-to-all", "gradients all-to-all", "exposed all-reduce")

Spread = dict[str, float]
"""Of one stage over ranks: `share` (or `seconds`), their mean; with several ranks also `least`, `most`, `most_rank`."""


class StageTimes:
    """Reads a stopwatch at intervals and compares ranks.

    Args:
        stopwatch: of this rank.
        ranks: all of which call every method at the same moments.
    """

    def __init__(self, stopwatch: Stopwatch, ranks: Ranks) -> None:
        self.stopwatch, self.ranks = stopwatch, ranks
        self.remark = ""  # the largest avoidable share of the last interval, in words
        self._before: dict[str, float] = {}
        self._seconds_before = 0.0

    def begin(self, seconds: float) -> None:
        """Begin an interval after `seconds` of training."""
        self._before, self._seconds_before = dict(self.stopwatch.seconds), seconds

    def end_interval(self, seconds: float) -> dict[str, Spread]:
        """Return each stage's share of the time since the last look, and begin anew (a collective call)."""
        spent = max(seconds - self._seconds_before, 1e-9)
        names = [name for name in STAGES if name not in OUTSIDE_TRAINING]
        shares = [self._spent_in(name) / spent for name in names]
        self.begin(seconds)
        # Clocks are read at different moments, so that the sum may be a little above the whole.
        found = self._compare([*names, OTHER_STAGE], [*shares, max(0.0, 1.0 - sum(shares))], "share")
        avoidable = {name: found[name]["share"] for name in AVOIDABLE if name in found}
        largest = max(avoidable, key=lambda name: avoidable[name], default="")
        self.remark = f"{avoidable[largest]:.0%} {largest}" if largest and avoidable[largest] >= 0.01 else ""
        return found

    def totals(self) -> dict[str, Spread]:
        """Return the seconds of each stage since the run began (a collective call)."""
        return self._compare(list(STAGES), [self.stopwatch.seconds.get(name, 0.0) for name in STAGES], "seconds")

    def _spent_in(self, name: str) -> float:
        return self.stopwatch.seconds.get(name, 0.0) - self._before.get(name, 0.0)

    def _compare(self, names: list[str], own: list[float], what: str) -> dict[str, Spread]:
        by_rank = self.ranks.gather_numbers(own)
        found: dict[str, Spread] = {}
        for name, values in zip(names, zip(*by_rank, strict=True), strict=True):
            if not any(values):
                continue
            found[name] = {what: sum(values) / len(values)}
            if len(values) > 1:
                most = max(values)
                found[name] |= {"least": min(values), "most": most, "most_rank": values.index(most)}
        return found

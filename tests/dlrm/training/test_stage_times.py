"""Shares of a step add up to one, belong to the interval that was asked for, and name what waits most."""

from __future__ import annotations

import pytest

from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.training.stage_times import OTHER_STAGE, StageTimes
from embeddings.stopwatch import Stopwatch


class Two(Ranks):
    """Two ranks in one process: the other one looks up three times as long, and waits for nothing."""

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:  # type: ignore[override]
        return [list(numbers), [3 * n if place == 2 else 0.0 for place, n in enumerate(numbers)]]


def test_an_interval_begins_where_the_last_one_ended() -> None:
    stopwatch = Stopwatch()
    times = StageTimes(stopwatch, ALONE)
    stopwatch.seconds = {"waiting for data": 100.0, "lookup": 50.0}
    times.begin(500.0)
    stopwatch.seconds |= {"waiting for data": 103.0, "lookup": 55.0, "evaluation": 40.0}
    found = times.end_interval(510.0)
    assert found == {
        "waiting for data": {"share": 0.3},
        "lookup": {"share": 0.5},
        OTHER_STAGE: {"share": pytest.approx(0.2)},
    }
    assert times.remark == "30% waiting for data"
    stopwatch.seconds |= {"lookup": 57.0}
    assert times.end_interval(514.0) == {"lookup": {"share": 0.5}, OTHER_STAGE: {"share": 0.5}}
    assert times.remark == ""
    assert times.totals()["evaluation"] == {"seconds": 40.0}


def test_ranks_are_compared() -> None:
    stopwatch = Stopwatch()
    times = StageTimes(stopwatch, Two(rank=0, count=2))
    stopwatch.seconds = {"lookup": 2.0, "rows all-to-all": 6.0}
    found = times.end_interval(10.0)
    assert found["lookup"] == pytest.approx({"share": 0.4, "least": 0.2, "most": 0.6, "most_rank": 1})
    assert found["rows all-to-all"] == pytest.approx({"share": 0.3, "least": 0.0, "most": 0.6, "most_rank": 0})
    assert times.remark == "30% rows all-to-all"

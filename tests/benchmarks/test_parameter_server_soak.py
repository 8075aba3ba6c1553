"""The soak runs from its flags to its figures: members come up, rows are pushed, born and evicted, and all end."""

from __future__ import annotations

import pytest


@pytest.mark.long
def test_a_short_one_measures_what_a_long_one_does(run_benchmark) -> None:
    measured = run_benchmark("parameter_server_soak", "--minutes", "1.25", "--churn-seconds", "5", "--bound", "1e6")
    assert measured["flat"] is True
    assert measured["pushed_rows_per_second"] > 0
    assert 0 < measured["rows_lowest"] <= measured["rows_highest"]
    for name in ("coordinator", "shard-0", "trainer-0", "reader"):
        assert measured[f"{name}_mib"] > 10
        assert f"{name}_mib_per_minute" in measured
    churn = ("killed_shards", "killed_trainers", "left_trainers", "joined_shards", "drained_shards")
    assert sum(measured.get(name, 0) for name in churn) > 0

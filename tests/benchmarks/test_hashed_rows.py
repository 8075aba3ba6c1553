"""The benchmark of rows on demand runs from its flags to its figures, on a table of nearly nothing."""

from __future__ import annotations

import pytest


@pytest.mark.long
def test_its_figures_follow_from_times(run_benchmark) -> None:
    measured = run_benchmark("hashed_rows", "--small", "--rounds", "1")
    for ours, theirs in (("pull", "local_look_up"), ("push", "local_update"), ("find", "dict")):
        rates = [measured[f"{name}_million_per_second"] for name in (ours, theirs)]
        assert min(rates) > 0
        assert measured[f"{ours}_vs_{theirs}"] == pytest.approx(rates[0] / rates[1], rel=0.05, abs=0.01)
    assert measured["births_million_per_second"] > 0
    assert measured["bytes_per_row"] == 4 * 72  # 64 numbers, a state and one to be even, and 6 words of book-keeping
    assert 8 / 0.7 <= measured["map_bytes_per_row"] < measured["dict_bytes_per_row"]

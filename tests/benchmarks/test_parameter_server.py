"""The parameter server's benchmark runs from its flags to its figures, with nearly nothing to pull or push."""

from __future__ import annotations

import pytest


def test_its_figures_are_there_and_above_nothing(run_benchmark) -> None:
    measured = run_benchmark("parameter_server", "--quick", "--parts", "rows", "journal")
    named = {"pull_rows_per_core_second", "push_rows_per_core_second", "pull_vs_rpc", "push_vs_rpc", "share_of_tcp"}
    assert named | {"journal_vs_none"} <= measured.keys()
    assert all(figure > 0 for figure in measured.values())
    assert measured["pull_rows_per_both_second"] <= 3 * measured["pull_rows_per_core_second"]


@pytest.mark.long
def test_trainers_go_on_while_another_is_slow(run_benchmark) -> None:
    measured = run_benchmark("parameter_server", "--quick", "--parts", "slow_trainer", "shm")
    assert measured["slow_trainer_steps"] > 1
    assert measured["slow_trainer_cost"] < 0.9
    assert measured["pull_vs_rpc_shm"] > 0

"""The parameter server's benchmark runs from its flags to its figures, with nearly nothing to pull or push."""

from __future__ import annotations

import pytest


@pytest.mark.long
def test_pushes_with_and_without_a_journal_are_compared(run_benchmark) -> None:
    measured = run_benchmark("parameter_server", "--quick", "--parts", "journal")
    assert measured.keys() == {"journal_vs_none", "journal_vs_none_fp32", "journal_vs_none_wall"}
    assert all(figure > 0 for figure in measured.values())


@pytest.mark.long
def test_all_figures_are_there_and_above_nothing(run_benchmark) -> None:
    measured = run_benchmark("parameter_server", "--quick", "--parts", "rows", "slow_trainer")
    named = {"pull_rows_per_core_second", "push_rows_per_core_second", "pull_vs_rpc", "push_vs_rpc", "share_of_tcp"}
    assert named <= measured.keys()
    assert measured.pop("slow_trainer_cost") < 0.9
    assert all(figure > 0 for figure in measured.values())


@pytest.mark.long
def test_rpc_is_measured_over_shared_memory_too(run_benchmark) -> None:
    measured = run_benchmark("parameter_server", "--quick", "--parts", "shm")
    assert measured["pull_vs_rpc_shm"] > 0

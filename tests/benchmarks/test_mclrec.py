"""The benchmark of MCLRec runs on generated sequences, and its figures belong together."""

from __future__ import annotations

import pytest


def test_figures_belong_together(run_benchmark) -> None:
    figures = run_benchmark("mclrec", "--batches", "1", "--turns", "1")
    batches = figures["sasrec_epoch_cpu_seconds"] / (figures["sasrec_per_thousand"] * 0.256)
    assert figures["three_step_epoch_cpu_seconds"] / figures["three_step_per_thousand"] == pytest.approx(
        batches * 0.256, rel=0.05
    )
    assert 0 < figures["floor_share"] < 1
    assert figures["full_ranking_cpu_seconds"] > 0

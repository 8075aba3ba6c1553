"""The optimizers' benchmark runs from its flags to its figures."""

from __future__ import annotations

import pytest


@pytest.mark.long
def test_its_figures_follow_from_times(run_benchmark) -> None:
    measured = run_benchmark("optimizers", "--small", "--rounds", "4")
    assert 0.3 < measured["lamb_vs_adam"] < 3.0
    assert measured["noise_scale_step_share"] == pytest.approx(
        (measured["noise_scale_measured_step"] - 1) / 50, abs=1e-4
    )
    assert measured["noise_scale_measured_step"] > 0.5
    assert measured["training_step_ms"] > measured["lamb_step_ms"] > 0

"""The GPU's benchmark runs from its flags to its figures, on a CPU and with nearly nothing to train."""

from __future__ import annotations

import pytest


@pytest.mark.long
def test_it_measures_what_a_cpu_has_of_it(run_benchmark) -> None:
    measured = run_benchmark("gpu_step", "--device", "cpu", "--small", "--steps", "2")
    assert measured["best"] in ("eager", "trainer")  # nothing compiled, no graphs, no rows of 16 bits
    for name in ("eager", "trainer"):
        assert measured[f"{name}_samples_per_second"] == pytest.approx(64 / measured[f"{name}_ms"] * 1e3)
        shares = measured[f"{name}_bandwidth_share"] + measured[f"{name}_products_share"]
        assert 0 < measured[f"{name}_floor_share"] == pytest.approx(shares)
        assert any("rowwise_adagrad" in kernel for kernel in measured[f"{name}_where"])
    assert "compiled_ms" not in measured

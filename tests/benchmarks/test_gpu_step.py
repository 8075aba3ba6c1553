"""The GPU's benchmark runs from its flags to its figures, on a CPU and with nearly nothing to train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_it_measures_what_a_cpu_has_of_it() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_step", "--device", "cpu", "--small", "--steps", "2"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["best"] in ("eager", "trainer")  # nothing compiled, no graphs, no rows of 16 bits
    for name in ("eager", "trainer"):
        assert measured[f"{name}_samples_per_second"] == pytest.approx(64 / measured[f"{name}_ms"] * 1e3)
        shares = measured[f"{name}_bandwidth_share"] + measured[f"{name}_products_share"]
        assert 0 < measured[f"{name}_floor_share"] == pytest.approx(shares)
        assert any("rowwise_adagrad" in kernel for kernel in measured[f"{name}_where"])
    assert "compiled_ms" not in measured

"""The optimizers' benchmark runs from its flags to its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_its_figures_follow_from_times() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.optimizers", "--small", "--rounds", "4"],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert 0.3 < measured["lamb_vs_adam"] < 3.0
    assert measured["noise_scale_step_share"] == pytest.approx(
        (measured["noise_scale_measured_step"] - 1) / 50, abs=1e-4
    )
    assert measured["noise_scale_measured_step"] > 0.5
    assert measured["training_step_ms"] > measured["lamb_step_ms"] > 0

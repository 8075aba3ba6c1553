"""The GPU's benchmark runs there in every variant, with nearly nothing to train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
VARIANTS = (
    "eager",
    "compiled",
    "cuda_graphs",
    "compiled_sgd",
    "compiled_fp16_rows",
    "compiled_fp16_rows_sgd",
    "trainer",
)


@pytest.mark.gpu
def test_every_variant_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_step", "--small", "--steps", "5"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert all(measured[f"{name}_samples_per_second"] > 0 for name in VARIANTS)
    assert all(measured[f"{name}_where"] for name in VARIANTS)

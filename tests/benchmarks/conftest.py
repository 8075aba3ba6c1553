"""Runs a benchmark as a user does, for every test of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_benchmark() -> Callable[..., dict[str, Any]]:
    """Return a function that runs the benchmark of a name with flags, on one thread, and returns its figures."""

    def run(name: str, *flags: str) -> dict[str, Any]:
        result = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *flags],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return figures

    return run

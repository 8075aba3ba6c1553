"""Plans as a user asks for them: through the command line, on a small click log, with no measurement at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm.cli import main
from dlrm.data.dataset import Dataset

RunPlan = Callable[..., tuple[int, str, str]]
COPIED_BELOW = 100  # the log's tables have up to 500 rows


@pytest.fixture(autouse=True)
def _no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def run_plan(click_log: Dataset, capsys: pytest.CaptureFixture[str]) -> RunPlan:
    """A function that runs `recforge plan synthetic` and returns exit status, output and complaints."""

    def run(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        own = (
            () if any("replicate" in flag for flag in flags) else ("--parallel.replicate-below-rows", str(COPIED_BELOW))
        )
        status = main(["plan", "synthetic", "--data", str(click_log.folder), *own, *flags])
        return (status, *capsys.readouterr())

    return run

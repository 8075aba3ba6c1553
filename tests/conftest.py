"""What every test folder shares: seeds, and reasons to skip where there are no real data or no GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings

# A commit passes or fails the same way each time. `HYPOTHESIS_PROFILE=default` draws other examples.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows: `RECFORGE_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("RECFORGE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RECFORGE_DATA to the folder that holds criteo_kaggle/ and ml-100k/")
    return folder


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """On a GPU, drivers and compilers warn of what nobody here can list: warnings there are shown, and no failures."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin with the same random numbers, in whatever order tests run; skip what needs a GPU that is not there."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if item.get_closest_marker("gpu") and (why := _why_no_gpu()):
        pytest.skip(why)


def _why_no_gpu() -> str | None:
    import fbgemm_gpu
    import torch

    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch can use"
    variant = getattr(fbgemm_gpu, "__variant__", "cuda")
    return None if variant == "cuda" else f"needs the CUDA build of fbgemm, found that for {variant}"

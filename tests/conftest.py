"""Fixtures that every test folder shares; the one on real data skips where the data is not at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows: `RECFORGE_DATA`, or `../shared/data` beside the repository."""
    folder = Path(os.environ.get("RECFORGE_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set RECFORGE_DATA to the folder that holds criteo_kaggle/ and ml-100k/")
    return folder

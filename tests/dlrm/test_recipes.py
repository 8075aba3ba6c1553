"""The recipes for real rows train through the command line, on the split they promise, and learn what is to be learned.

The bounds lie below what every seed reaches (docs/results.md) and above what a part of the features gives.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dlrm.cli import main


@pytest.mark.parametrize(
    ("recipe", "place", "test_rows", "least_auc"),
    [
        ("criteo-kaggle-sample", "criteo_kaggle/train_head_10000.tsv", 2_000, 0.72),
        ("movielens-100k", "ml-100k", 20_001, 0.69),
    ],
)
def test_recipe_on_real_rows(
    recipe: str,
    place: str,
    test_rows: int,
    least_auc: float,
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # prepared data goes under ./datasets
    run = tmp_path / "run"
    flags = ["--data", str(shared_data / place), "--output", str(run), "--seed", "3", "--step.threads", "1"]
    assert main(["train", recipe, *flags]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["split"], summary["split_samples"]) == ("test", test_rows)
    config = json.loads((run / "config.json").read_text())
    # The whole training part, in each of the epochs that the recipe fixes: there is no valid split to stop by.
    trained_rows = 8_000 if recipe == "criteo-kaggle-sample" else 79_999
    assert summary["samples"] == config["epochs"] * trained_rows
    assert summary["auc"] > least_auc
    assert 0.9 < summary["calibration"] < 1.1

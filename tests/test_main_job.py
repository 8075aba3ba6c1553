"""What `make train` runs, whole: it must recover at least 90 % of the reachable AUC above .5 on held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.cli import main

KEYS = {"auc", "logloss", "normalized_entropy", "calibration", "samples", "seconds", "samples_per_second"}


def test_the_synthetic_recipe_recovers_what_can_be_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "synthetic", "--output", "run", "--seed", "7"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= KEYS | {"peak_rss_bytes", "bayes_auc"}
    assert summary["split"] == "test"
    assert 0.8 < summary["bayes_auc"] < 0.9
    assert (summary["auc"] - 0.5) / (summary["bayes_auc"] - 0.5) >= 0.90
    assert f"best possible {summary['bayes_auc']:.4f}" in capsys.readouterr().out
    assert main(["report", "run"]) == 0

"""Makes the folders of runs out of nothing but files, in the form that the training loop gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]
HOSTILE = "<script>alert(1)</script>"
TABLES = ("site", "app", HOSTILE, 'user\'s "id"')


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """A function that writes a run of a million samples into a folder, and returns the folder."""

    def write(name: str = "run", *, finished: bool = True, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        records = [*_training(), *_validation()]
        records.sort(key=lambda record: record["samples"])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "config.json").write_text(json.dumps(_config()))
        if finished:
            (folder / "summary.json").write_text(json.dumps(_summary() | changes))
            (folder / "tables.json").write_text(json.dumps({"tables": list(_tables())}))
        return folder

    return write


def measure(auc: float, rows: int = 20_000) -> dict[str, Any]:
    """What an evaluation gives, with 20 calibration bins and three segments."""
    predictions = [0.01 + 0.7 * (i / 19) ** 2 for i in range(20)]
    labels = [p * (0.9 + 0.01 * i) for i, p in enumerate(predictions)]
    return {
        "split_samples": rows,
        "positives": rows // 4,
        "auc": auc,
        "logloss": 0.9 - 0.6 * auc,
        "normalized_entropy": 1.6 - auc,
        "calibration": 1.02 - (0.8 - auc),
        "mean_prediction": 0.255,
        "prediction_std": 0.2,
        "undefined": None,
        "calibration_curve": [
            {"samples": rows // 20, "mean_prediction": p, "mean_label": y}
            for p, y in zip(predictions, labels, strict=True)
        ],
        "segments": [
            {
                "segment": i,
                "samples": rows // i,
                "positives": rows // (4 * i),
                "auc": auc - 0.01 * i,
                "calibration": 1.0,
                "mean_prediction": 0.25,
            }
            for i in (2, 3, 7)
        ],
    }


def _training() -> Iterator[dict[str, Any]]:
    for i in range(1, 51):
        samples = 20_000 * i
        yield {
            "kind": "train",
            "samples": samples,
            "loss": 0.45 + 0.2 * math.exp(-i / 10) + 0.01 * math.sin(37.0 * i),
            "seconds": 2.5 * i + 0.1 * math.sin(11.0 * i),
            "samples_per_second": 8000.0,
            "dense_learning_rate": 0.005 * min(1.0, i / 5),
            "tables_learning_rate_factor": 1.0 if i < 30 else 1.0 - (i - 30) / 25,
            "stages": {"waiting for data": {"share": 0.01 * (i % 5)}, "lookup": {"share": 0.2}},
        }


def _validation() -> Iterator[dict[str, Any]]:
    for i in range(1, 11):
        auc = 0.78 - 0.15 * math.exp(-i / 2) - (0.002 if i == 10 else 0.0)
        yield {"kind": "valid", **measure(auc), "seconds": 12.5 * i, "samples": 100_000 * i}


def _summary() -> dict[str, Any]:
    return {
        **measure(0.7765, 40_000),
        "split": "test",
        "samples": 1_000_000,
        "seconds": 125.4,
        "samples_per_second": 1_000_000 / 125.4,
        "peak_rss_bytes": 1_400_000_000,
        "stopped": "all epochs done",
        "best_samples": 900_000,
        "stage_seconds": {
            "waiting for data": 4.2,
            "dense forward": 38.0,
            "lookup": 15.0,
            "dense backward": 57.0,
            "dense update": 8.0,
            "evaluation": 14.0,
            "checkpoint": 0.8,
        },
        "bayes_auc": 0.8012,
        "recovered_auc": 0.2765 / 0.3012,
    }


def _tables() -> Iterator[dict[str, Any]]:
    for i, name in enumerate(TABLES):
        num_rows = (2_000_000, 900, 31_000, 12)[i]
        yield {
            "name": name,
            "features": [name] if i else [name, "last_site"],
            "num_rows": num_rows,
            "dim": 16,
            "pooling": "sum",
            "optimizer": "RowWiseAdagrad",
            "bytes": num_rows * 17 * 4,
            "trained_rows": num_rows // (i + 1),
            "mean_row_norm": 0.1 * (i + 1),
        }


def _config() -> dict[str, Any]:
    return {
        "recipe": "synthetic",
        "epochs": 1.0,
        "time_limit_seconds": None,
        "shuffle": True,
        "seed": 0,
        "log_every_samples": 20_000,
        "dense": {"name": "lamb", "learning_rate": 0.005, "betas": None},
        "evaluation": {"every_samples": 100_000, "segment_by": HOSTILE},
        "model": {"dim": 16, "bottom": [64], "top": [64, 32], "interaction": "dot"},
        "tables": {"optimizer": "rowwise_adagrad", "learning_rate": 0.05},
        "output": "runs/first",
        "dataset": "datasets/synthetic",
    }

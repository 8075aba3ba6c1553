"""The report of a run that was judged by ranks speaks of them, says what was filtered, and is silent on clicks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dlrm.analysis.report import write_report
from dlrm.analysis.run_folder import read_run
from dlrm.analysis.verdict import describe_quality, list_complaints, list_figures


def measure(quality: float, **changes: Any) -> dict[str, Any]:
    """What an evaluation of ranks gives."""
    names = ("recall", "ndcg", "mrr", "precision", "coverage")
    numbers = {f"{name}_{k}": quality * k / 20 for name in names for k in (5, 10, 20, 50)}
    return {**numbers, "ties": 0.0, "filter_seen": False, "split_samples": 22_363} | changes


@pytest.fixture
def write_ranked_run(tmp_path: Path) -> Any:
    """A function that writes a run of ten evaluations."""

    def write(**changes: Any) -> Path:
        records = []
        for i in range(1, 11):
            records.append({"kind": "train", "samples": 1000 * i, "loss": 9.0 - 0.1 * i, "seconds": 1.0 * i})
            records.append({"kind": "valid", "samples": 1000 * i, "seconds": 1.0 * i, **measure(0.01 * i, **changes)})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        summary = {**measure(0.1742, **changes), "split": "test", "samples": 10_000, "seconds": 10.0, "stopped": "done"}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return tmp_path

    return write


def test_ranks_take_the_place_of_clicks(write_ranked_run: Any) -> None:
    folder = write_ranked_run(popularity_bias_10=1.234)
    run = read_run(folder)
    assert describe_quality(run) == (
        "The right item is among the first 10 for 8.7 % of 22,363 users of the test split, unfiltered (with items seen "
        "before): recall@10 0.0871, NDCG@10 0.0871, MRR@10 0.0871."
    )
    assert [(f["label"], f["value"], f["note"]) for f in list_figures(run)][:4] == [
        ("Recall@10", "0.0871", "unfiltered"),
        ("NDCG@10", "0.0871", "unfiltered"),
        ("MRR@10", "0.0871", "unfiltered"),
        ("Coverage@10", "8.7 %", "popularity bias +1.23"),
    ]
    assert list_complaints(run) == []
    page = write_report(folder).read_text(encoding="utf-8")
    for name in ("loss", "recall", "ndcg"):
        assert f'data-plot="{name}"' in page
    assert "Recall on the valid split, unfiltered" in page
    own = page.partition("<footer>")[0]
    assert not any(word in own for word in ("--model.", "AUC", "Log loss", "probabilities", "Calibration"))


def test_filtered_numbers_say_so(write_ranked_run: Any) -> None:
    folder = write_ranked_run(filter_seen=True)
    run = read_run(folder)
    assert "filtered (without items seen before)" in describe_quality(run)
    assert [figure["note"] for figure in list_figures(run)][:3] == ["filtered"] * 3
    assert "NDCG on the valid split, filtered" in write_report(folder).read_text(encoding="utf-8")


def test_numbers_of_trained_targets_say_so(write_ranked_run: Any) -> None:
    folder = write_ranked_run(skip_unseen_targets=True)
    run = read_run(folder)
    assert "unfiltered (with items seen before), of targets that training saw alone" in describe_quality(run)
    assert [figure["note"] for figure in list_figures(run)][:3] == ["unfiltered, trained targets"] * 3
    assert "NDCG on the valid split, unfiltered, trained targets" in write_report(folder).read_text(encoding="utf-8")


def test_ties_are_complained_of(write_ranked_run: Any) -> None:
    run = read_run(write_ranked_run(ties=12_100.0))
    (complaint,) = list_complaints(run)
    assert complaint.startswith("On average 12,100.0 other items score exactly what the right one does")

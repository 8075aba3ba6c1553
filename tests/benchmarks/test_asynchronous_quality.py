"""Gaps of asynchronous runs are to the synchronous run of the same seed; runs that are there are not trained again."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(("seeds", "quantile"), [(1, None), (9, 2.3060)])
def test_gaps_follow_from_summaries(run_benchmark, tmp_path, seeds, quantile) -> None:
    def save(name, **summary) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))

    for seed in range(seeds):
        save(f"synchronous-{seed}", auc=0.7 + seed / 100)
        save(f"2-trainers-None-{seed}", auc=0.69 + seed / 100)
        save(f"4-trainers-None-{seed}", auc=0.7, mean_staleness=seed)
        save(f"4-trainers-16-{seed}", auc=0.71 + seed / 50, mean_staleness=2.0)
    page = tmp_path / "figure.html"
    flags = ["--trainers", "2", "4", "--figure", str(page), "--bounds", "16", "none"]
    figures = run_benchmark("asynchronous_quality", "--folder", str(tmp_path), "--seeds", str(seeds), *flags)
    assert "4 trainers, at most 16 ahead" in page.read_text(encoding="utf-8")
    middle = (seeds - 1) / 2
    assert figures["seeds"] == seeds
    assert figures["auc_synchronous"] == pytest.approx(0.7 + middle / 100)
    assert figures["gap_2_trainers"] == pytest.approx(-0.01)
    assert figures["gap_4_trainers"] == pytest.approx(-middle / 100)
    assert "mean_staleness_2_trainers" not in figures
    assert figures["mean_staleness_4_trainers"] == pytest.approx(middle)
    bounded, free = figures["by_staleness"]
    assert (bounded["bound"], free["bound"]) == (16, None)
    assert bounded["gap_4_trainers"] == pytest.approx(0.01 + middle / 100)
    assert free["gap_4_trainers"] == figures["gap_4_trainers"]
    if quantile is None:
        assert "gap_4_trainers_ci" not in figures
        return
    # Of 0, 1, ..., n - 1 hundredths the sample's variance is n (n + 1) / 12.
    spread = 0.01 * (seeds * (seeds + 1) / 12) ** 0.5
    assert figures["gap_4_trainers_ci"] == pytest.approx(quantile * spread / seeds**0.5, rel=1e-4)
    assert figures["gap_2_trainers_ci"] == pytest.approx(0, abs=1e-9)

"""The benchmarks of MCLRec's steps and curves give their figures, of the sequences they were given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from deploy.cli import main

BATCH = 256  # of the recipe
FORMS = ("three_step", "two_step", "sasrec")
KEYS = {"floor_share", "full_ranking_cpu_seconds"} | {f"{form}_epoch_cpu_seconds" for form in FORMS}


def test_figures_are_those_of_the_sequences(run_benchmark, tmp_path: Path) -> None:
    config = SyntheticSequencesConfig(num_users=400, num_items=100, num_tastes=4)
    samples = generate_sequences(config, tmp_path / "data").rows("train")
    figures = run_benchmark("mclrec", "--data", str(tmp_path / "data"), "--batches", "2", "--turns", "1")
    assert set(figures) == KEYS | {f"{form}_per_thousand" for form in FORMS}
    batches = -(-samples // BATCH)
    assert batches > 1
    for form in FORMS:
        a_batch = figures[f"{form}_per_thousand"] * BATCH / 1000
        assert figures[f"{form}_epoch_cpu_seconds"] == pytest.approx(batches * a_batch, rel=0.01, abs=1e-3)
    # Contrast needs the views encoded besides, and the third step all of them once more.
    three_step, two_step, sasrec = (figures[f"{form}_epoch_cpu_seconds"] for form in FORMS)
    assert three_step > two_step > sasrec > 0
    assert 0 < figures["floor_share"] < 1
    assert figures["full_ranking_cpu_seconds"] > 0


def test_the_comparison_with_a_gpu_runs_where_there_is_none(run_benchmark, tmp_path: Path) -> None:
    generate_sequences(SyntheticSequencesConfig(num_users=400, num_items=100, num_tastes=4), tmp_path / "data")
    flags = ["--data", str(tmp_path / "data"), "--devices", "cpu", "--batches", "1", "--turns", "1"]
    figures = run_benchmark("sequence_gpu", *flags)
    assert set(figures) == {f"{form}_cpu_ms" for form in FORMS}
    assert min(figures.values()) > 0


def test_a_curve_is_of_the_test_split(run_benchmark, tmp_path: Path) -> None:
    config = SyntheticSequencesConfig(num_users=200, num_items=60, num_tastes=4, most_actions=20)
    generate_sequences(config, tmp_path / "data")
    curve = run_benchmark("sequence_curve", "--data", str(tmp_path / "data"), "--epochs", "2")
    assert [len(values) for values in curve.values()] == [2] * 4
    flags = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--step.threads", "1"]
    assert main(["train", "sasrec", *flags, "--epochs", "2", "--evaluation.no-test-best"]) == 0
    ranked = json.loads((tmp_path / "run" / "summary.json").read_text())["ranked"]
    for name, (_, last) in curve.items():
        assert last == pytest.approx(ranked[f"unfiltered/{name.replace('_', '@')}"], abs=1e-4)

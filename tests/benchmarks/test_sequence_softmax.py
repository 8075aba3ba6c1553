"""The benchmark of softmaxes trains and times each arm on a tiny file, goes on, and reads what was trained before."""

from __future__ import annotations

import numpy as np
import pytest


def test_arms_are_trained_once_and_timed(run_benchmark, tmp_path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"u{user} {' '.join(map(str, rng.integers(1, 80, 6)))}" for user in range(60)]
    data = tmp_path / "actions.txt"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    same = ("--data", str(data), "--folder", str(tmp_path / "runs"), "--arms", "full", "in_batch", "--turns", "1")
    flags = ("--epochs", "1", "--batches", "1", "--flags", "--dim", "8", "--evaluation.no-test-best")
    figures = run_benchmark("sequence_softmax", *same, *flags)
    assert figures["actions"] == 360
    assert figures["batches"] == 1
    for name in ("full", "in_batch"):
        arm = figures["arms"][name]
        assert arm["epoch_cpu_seconds"] == pytest.approx(arm["batch_ms"] / 1e3, abs=1e-5)
        assert arm["run_cpu_seconds"] > 0.5
        assert 0.1 < arm["peak_resident_gib"] < 2
        assert 0 <= arm["unfiltered/ndcg@10"] <= arm["unfiltered/recall@10"] <= arm["filtered/recall@20"] <= 1
    again = run_benchmark("sequence_softmax", *same, "--epochs", "1", "--batches", "0")
    for name in ("full", "in_batch"):
        kept = {
            key: value for key, value in figures["arms"][name].items() if key not in ("batch_ms", "epoch_cpu_seconds")
        }
        assert again["arms"][name] == kept

"""The benchmark of softmaxes trains and times an arm on a tiny file, and reads it when it was trained before."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.long
def test_an_arm_is_trained_once_and_timed(run_benchmark, tmp_path) -> None:
    rng = np.random.default_rng(0)
    lines = [f"u{user} {' '.join(map(str, rng.integers(1, 80, 6)))}" for user in range(60)]
    data = tmp_path / "actions.txt"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    same = ("--data", str(data), "--folder", str(tmp_path / "runs"), "--arms", "in_batch", "--epochs", "1")
    flags = ("--turns", "1", "--batches", "1", "--flags", "--dim", "16", "--guards.chance-evaluations", "0")
    figures = run_benchmark("sequence_softmax", *same, *flags)
    assert figures["actions"] == 360
    assert figures["batches"] == 1
    arm = figures["arms"]["in_batch"]
    assert arm.pop("epoch_cpu_seconds") == pytest.approx(arm.pop("batch_ms") / 1e3, abs=1e-5)
    assert arm["run_cpu_seconds"] > 0.5
    assert 0.1 < arm["peak_resident_gib"] < 2
    assert 0 <= arm["unfiltered/ndcg@10"] <= arm["unfiltered/recall@10"] <= arm["filtered/recall@20"] <= 1
    assert run_benchmark("sequence_softmax", *same, "--batches", "0")["arms"] == {"in_batch": arm}

"""The comparison of ways to train with large batches: its intervals are right, and it goes on where it stopped.

What it finds is in docs/large_batch.md; here it runs on a log of few rows, from which nobody learns anything.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.large_batch import main
from benchmarks.large_batch_arms import configure
from benchmarks.large_batch_intervals import ArmScores, mean_auc, mean_gap
from benchmarks.large_batch_settings import ARMS, LOGS
from benchmarks.large_batch_tuning import on_the_edge, search


def _draw(rng: np.random.Generator, rows: int, seeds: int, strength: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Scores of several models that share most of their errors, with ties, and labels."""
    labels = (rng.random(rows) < 0.3).astype(np.float64)
    shared = strength * labels + rng.standard_normal(rows)
    return [np.round(shared + 0.3 * rng.standard_normal(rows), 1) for _ in range(seeds)], labels


def test_auc_of_an_arm_is_the_mean_over_its_seeds() -> None:
    scores, labels = _draw(np.random.default_rng(1), 3_000, 4, 0.8)
    aucs = [roc_auc_score(labels, its_scores) for its_scores in scores]
    arm = ArmScores.of(scores, labels)
    np.testing.assert_allclose(arm.aucs, aucs, rtol=1e-12)
    np.testing.assert_allclose(arm.wins[labels == 0].mean(), np.mean(aucs), rtol=1e-12)
    assert mean_auc(arm).mean == pytest.approx(np.mean(aucs))


def test_interval_of_a_gap_is_that_of_redrawn_rows() -> None:
    """With one seed, the standard error is that of a paired bootstrap of the test rows."""
    rng = np.random.default_rng(2)
    (first, second), labels = _draw(rng, 1_000, 2, 0.8)
    gap = mean_gap(ArmScores.of([first], labels), ArmScores.of([second], labels))
    draws = [rng.integers(0, len(labels), len(labels)) for _ in range(300)]
    gaps = [roc_auc_score(labels[draw], first[draw]) - roc_auc_score(labels[draw], second[draw]) for draw in draws]
    assert gap.mean == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second))
    assert gap.half == pytest.approx(1.96 * np.std(gaps), rel=0.15)
    # pairing is what makes it short
    alone = mean_auc(ArmScores.of([first], labels)).half
    assert gap.half < 0.7 * math.sqrt(2) * alone


def test_interval_covers_other_seeds_as_well() -> None:
    scores, labels = _draw(np.random.default_rng(3), 20_000, 3, 0.8)
    rng = np.random.default_rng(4)
    worse = [
        its_scores + noise * rng.standard_normal(len(labels))
        for its_scores, noise in zip(scores, (0.1, 1, 2), strict=True)
    ]
    arm, other = ArmScores.of(scores, labels), ArmScores.of(worse, labels)
    gap = mean_gap(arm, other)
    deviation = np.std(arm.aucs - other.aucs, ddof=1) / math.sqrt(3)
    assert gap.mean > 0
    assert gap.half > 4.3 * deviation  # the t quantile of two degrees of freedom; rows add the rest
    assert gap.half < 4.5 * deviation


def test_search_comes_closer_repeats_itself_and_stays_inside() -> None:
    space = {"rate": (1e-3, 1e-1), "eps": (1e-6, 1e-2)}
    calls: list[dict[str, float]] = []

    def measure(point: object) -> float:
        calls.append(dict(point))  # type: ignore[call-overload]
        return -(math.log(calls[-1]["rate"] / 0.02) ** 2) - 0.1 * math.log(calls[-1]["eps"] / 1e-4) ** 2

    tried = search(measure, space, [{"rate": 1e-3, "eps": 1e-6}], 40)
    assert [trial.point for trial in search(measure, space, [{"rate": 1e-3, "eps": 1e-6}], 40)] == calls[:40]
    assert tried[0].point == {"rate": 1e-3, "eps": 1e-6}
    assert all(least <= point[name] <= most for point in calls for name, (least, most) in space.items())
    best = max(tried, key=lambda trial: trial.auc)
    assert best.auc > -0.2 > tried[0].auc
    assert on_the_edge(best, space) == []
    assert on_the_edge(tried[0], space) == ["rate", "eps"]


@pytest.mark.parametrize("log", list(ARMS))
def test_every_arm_is_a_configuration_within_its_space(log: str) -> None:
    for name, arm in ARMS[log].items():  # type: ignore[index]
        config = configure(LOGS[log], arm, rows=100_000, seed=0, threads=1)  # type: ignore[index]
        factor = 1 if name.startswith("small_batch") else int(name.split("_")[-1].removesuffix("x"))
        largest = config.growth.max_batch_size or config.step.global_batch_size
        assert largest == factor * LOGS[log].batch_size  # type: ignore[index]
        for setting, (least, most) in arm.space.items():
            assert least <= getattr(arm.settings, setting) <= most, (name, setting)


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*flags: str) -> dict[str, float | str]:
        monkeypatch.setattr(sys, "argv", ["large_batch", "--small", "--folder", str(tmp_path), *flags])
        main()
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    arms = ("--arms", "unscaled_16x", "lamb_adagrad_16x", "adam_adagrad_4x", "--seeds", "1")
    measured = run(*arms)
    log = tmp_path / "synthetic-small" / "runs.jsonl"
    lines = log.read_text().splitlines()
    assert len(lines) == 4
    for name in ("small_batch", "unscaled_16x", "best_16x", "best_4x", "lamb_16x"):
        assert 0.4 < float(measured[f"auc_{name}"]) < 0.9
        assert 0 < float(measured[f"auc_{name}_ci"]) < 0.5
    assert measured["best_recipe_16x"] in arms
    gap = float(measured["auc_best_16x"]) - float(measured["auc_small_batch"])
    assert measured["gap_best_16x"] == pytest.approx(gap, abs=2e-5)
    # the last run was lost half-way: it is trained again, the others are not
    log.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert run(*arms) == measured
    assert log.read_text().splitlines()[-1] == lines[-1]

"""Trains arms with several seeds, and says what each reaches and what it costs beside the small batch."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.large_batch_arms import Arm, Log, configure
from benchmarks.large_batch_intervals import ArmScores, Interval, mean_auc, mean_gap
from benchmarks.large_batch_runs import Runs
from benchmarks.large_batch_settings import SMALL
from benchmarks.large_batch_tuning import Point, on_the_edge, search

if TYPE_CHECKING:
    from dlrm.config import RunConfig


@dataclass(frozen=True)
class Measured:
    """What the runs of an arm have shown."""

    arm: Arm
    valid_auc: float
    steps: float
    scores: ArmScores


class Comparison:
    """Of the arms on one log.

    Args:
        log: what they have in common.
        runs: trains, and remembers.
        threads: of torch.
    """

    def __init__(self, log: Log, runs: Runs, *, threads: int) -> None:
        self._log, self._runs, self._threads = log, runs, threads
        self._rows, self._labels = runs.dataset.rows("train"), runs.labels("test")

    def tune(self, name: str, arm: Arm, trials: int) -> dict[str, Any]:
        """Search an arm's settings on the validation rows, from its own and from those next to them."""

        def measure(point: Point) -> float:
            changes: dict[str, Any] = dict(point)
            trial = replace(arm, settings=replace(arm.start or arm.settings, **changes))
            outcome = self._runs.run(name, self._configure(trial, seed=0))
            shown = ", ".join(f"{setting} {value:g}" for setting, value in point.items())
            print(f"{name}: {outcome.valid_auc:.4f} with {shown} {outcome.error or ''}", file=sys.stderr, flush=True)
            return outcome.valid_auc

        if arm.start is None:
            raise ValueError(f"--tune {name}: expected an arm whose settings are searched, got one of a rule")
        start = {setting: getattr(arm.start, setting) for setting in arm.space}
        tried = search(measure, arm.space, [start], trials)
        best = max(tried, key=lambda trial: trial.auc)
        return {"valid_auc": best.auc, **best.point, "on_the_edge": on_the_edge(best, arm.space)}

    def compare(self, arms: Mapping[str, Arm], seeds: Sequence[int]) -> dict[str, Any]:
        """Train and measure all arms; return what the benchmark prints."""
        measured = {name: self._measure(name, arm, seeds) for name, arm in arms.items()}
        result: dict[str, Any] = {"seeds": len(seeds)}
        small = measured[SMALL]
        for name, its in measured.items():
            _put(result, f"auc_{name}", mean_auc(its.scores))
            result |= {f"valid_auc_{name}": round(its.valid_auc, 5), f"steps_{name}": round(its.steps)}
            if its is not small:
                _put(result, f"gap_{name}", mean_gap(its.scores, small.scores))
        for factor in sorted({its.arm.factor for its in measured.values()} - {1}):
            _describe_factor(result, {name: its for name, its in measured.items() if its.arm.factor == factor}, small)
        return result

    def _measure(self, name: str, arm: Arm, seeds: Sequence[int]) -> Measured:
        """Train an arm with all seeds."""
        valid, scores, steps = [], [], []
        for seed in seeds:
            outcome = self._runs.run(name, self._configure(arm, seed), test=True)
            valid.append(outcome.valid_auc)
            steps.append(outcome.steps)
            if outcome.test_scores is None:
                print(f"{name}, seed {seed}: {outcome.error}", file=sys.stderr, flush=True)
            scores.append(np.zeros(len(self._labels)) if outcome.test_scores is None else outcome.test_scores)
        measured = Measured(arm, statistics.mean(valid), statistics.mean(steps), ArmScores.of(scores, self._labels))
        shown = " ".join(f"{auc:.4f}" for auc in measured.scores.aucs)
        print(
            f"{name:24} valid {measured.valid_auc:.4f}, test {shown}, {measured.steps:.0f} steps",
            file=sys.stderr,
            flush=True,
        )
        return measured

    def _configure(self, arm: Arm, seed: int) -> RunConfig:
        return configure(self._log, arm, rows=self._rows, seed=seed, threads=self._threads)


def _describe_factor(result: dict[str, Any], measured: Mapping[str, Measured], small: Measured) -> None:
    """Say which arm of one batch size does best, and LAMB's, what they cost, and what they win over no change."""
    factor = next(iter(measured.values())).arm.factor
    best = _choose(measured)
    result[f"best_recipe_{factor}x"] = best
    chosen = {"best": best}
    if lambs := {name: its for name, its in measured.items() if its.arm.settings.dense == "lamb"}:
        chosen["lamb"] = _choose(lambs)
    unscaled = measured.get(f"unscaled_{factor}x")
    for role, name in chosen.items():
        scores = measured[name].scores
        _put(result, f"auc_{role}_{factor}x", mean_auc(scores))
        _put(result, f"gap_{role}_{factor}x", mean_gap(scores, small.scores))
        if unscaled is not None:
            _put(result, f"gain_{role}_{factor}x", mean_gap(scores, unscaled.scores))


def _choose(measured: Mapping[str, Measured]) -> str:
    return max(measured, key=lambda name: measured[name].valid_auc)


def _put(result: dict[str, Any], name: str, interval: Interval) -> None:
    result |= {name: round(interval.mean, 5), f"{name}_ci": round(interval.half, 5)}

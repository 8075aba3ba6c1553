"""Ranks policies of the learning rate: each at its best rate, over seeds that had no part in choosing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dlrm.analysis.study.steps_to_result import find_crossing
from dlrm.analysis.study.study_folder import Record, StudyFolder


@dataclass(frozen=True, kw_only=True)
class PolicyRun:
    """A run that is wanted.

    Attributes:
        name: of the trial.
        policy: its name.
        factor: on both learning rates; None has the policy find it by itself.
        seed: of the run.
        is_reported: whether it is one of those that are reported, of which more is measured.
    """

    name: str
    policy: str
    factor: float | None
    seed: int
    is_reported: bool


Train = Callable[[PolicyRun], Mapping[str, Any]]
"""Gives at least `best`, the best value of the metric or None where it diverged, and `course`, of [samples, value]."""


@dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """What a policy gave.

    Attributes:
        policy: its name.
        factor: the best one tried; None where it found its own.
        runs: records of the reported runs, one per seed.
        tried: records of the runs that chose the factor.
        value: mean of the metric over seeds; None where one of them diverged.
        deviation: standard deviation over seeds; None below two.
    """

    policy: str
    factor: float | None
    runs: tuple[Record, ...]
    tried: tuple[Record, ...]
    value: float | None
    deviation: float | None

    def mean(self, name: str) -> float | None:
        """Return the mean over seeds of another number of the records; None where one lacks it."""
        numbers = [float(record[name]) for record in self.runs if record.get(name) is not None]
        return fmean(numbers) if numbers and len(numbers) == len(self.runs) else None

    def samples_to(self, goal: float, *, higher_is_better: bool) -> float | None:
        """Return the mean of samples to a goal; None where a run does not come to it."""
        found = [find_crossing(r.get("course", ()), goal, higher_is_better=higher_is_better) for r in self.runs]
        came = [samples for samples in found if samples is not None]
        return fmean(came) if came and len(came) == len(found) else None


def compare_policies(
    train: Train,
    policies: Sequence[str],
    factors: Mapping[str, Sequence[float | None]],
    *,
    seeds: int,
    first_seed: int = 0,
    higher_is_better: bool = True,
    study: StudyFolder | None = None,
) -> list[PolicyResult]:
    """Train every policy with every factor, then the best factor of each over other seeds; rank by their mean.

    Args:
        train: trains a run and measures it.
        policies: their names.
        factors: on the learning rates, of each policy as many as of the others; [None] where it finds its own.
        seeds: that are reported, `first_seed` + 1 and following; the factor is chosen with `first_seed`.
        first_seed: see there.
        higher_is_better: as of AUC.
        study: writes each trial down.

    Returns:
        The policies, best first; those that diverged last.
    """

    def run(wanted: PolicyRun) -> Record:
        return dict(train(wanted)) if study is None else study.trial(wanted.name, lambda: train(wanted))

    sign = 1 if higher_is_better else -1

    def rank(record: Record) -> float:
        return -math.inf if record["best"] is None else sign * float(record["best"])

    results = []
    for policy in policies:
        tried = []
        for factor in factors[policy] if len(factors[policy]) > 1 else ():
            wanted = PolicyRun(
                name=f"{policy}/factor-{factor:g}", policy=policy, factor=factor, seed=first_seed, is_reported=False
            )
            tried.append((run(wanted), factor))
        best = max(tried, key=lambda pair: rank(pair[0]))[1] if tried else factors[policy][0]
        runs = [
            run(PolicyRun(name=f"{policy}/seed-{seed}", policy=policy, factor=best, seed=seed, is_reported=True))
            for seed in range(first_seed + 1, first_seed + 1 + seeds)
        ]
        results.append(_sum_up(policy, best, runs, [record for record, _ in tried]))
    return sorted(results, key=lambda result: -math.inf if result.value is None else sign * result.value, reverse=True)


def common_goal(results: Sequence[PolicyResult], *, higher_is_better: bool = True) -> float | None:
    """Return the goal that samples are counted to where none is given: what the least good run came to."""
    values = [record["best"] for result in results for record in result.runs if record["best"] is not None]
    return (min if higher_is_better else max)(values) if values else None


def can_be_told_apart(one: PolicyResult, other: PolicyResult) -> bool:
    """Whether two means differ by more than two standard errors of their difference."""
    if one.value is None or other.value is None:
        return one.value is not other.value
    if one.deviation is None or other.deviation is None:
        return False
    error = math.sqrt(one.deviation**2 / len(one.runs) + other.deviation**2 / len(other.runs))
    return abs(one.value - other.value) > 2 * error


def _sum_up(policy: str, factor: float | None, runs: Sequence[Record], tried: Sequence[Record]) -> PolicyResult:
    values = [record["best"] for record in runs]
    came = [float(value) for value in values if value is not None]
    is_whole = len(came) == len(values) > 0
    return PolicyResult(
        policy=policy,
        factor=factor,
        runs=tuple(runs),
        tried=tuple(tried),
        value=fmean(came) if is_whole else None,
        deviation=stdev(came) if is_whole and len(came) > 1 else None,
    )

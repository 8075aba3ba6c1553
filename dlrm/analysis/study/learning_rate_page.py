"""The page of a learning-rate study: which policy to take, in words, then what it was compared by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.analysis.study.compare_policies import PolicyResult, can_be_told_apart
from dlrm.analysis.study.learning_rate_charts import (
    color_policies,
    draw_exploration,
    draw_metric,
    draw_paths,
    draw_rates,
)
from dlrm.analysis.study.page import METRICS, format_significant, write_study_page
from dlrm.analysis.study.policies import Policy
from dlrm.analysis.study.study_folder import Record, StudyFolder
from dlrm.analysis.study.trial_run import RUNS
from dlrm.analysis.study.weight_path import PATH, project_paths
from dlrm.config import RunConfig

TEMPLATE = Path(__file__).parent / "page" / "learning_rate.html"


def write_learning_rate_page(
    study: StudyFolder,
    results: Sequence[PolicyResult],
    policies: Sequence[Policy],
    goal: float | None,
    run: RunConfig,
    *,
    name: str,
) -> str:
    """Write the page into the study's folder, and return the verdict and where the page lies."""
    metric, known = METRICS[run.evaluation.metric], {policy.name: policy for policy in policies}
    verdict, advice = describe_verdict(results, metric), describe_advice(results, known, run)
    colors = color_policies(results)
    explored = [r for trial, r in study.records.items() if trial.endswith("/explore")]
    page = write_study_page(
        study.folder,
        TEMPLATE,
        kind=study.kind,
        title=f"{name}: which learning-rate policy?",
        verdict=verdict,
        advice=advice,
        warnings=list_warnings(results, explored),
        figures=_list_figures(results, goal, metric),
        metric=metric,
        goal=goal,
        rows=[_describe_row(result, known[result.policy], goal, study, run) for result in results],
        rates=draw_rates(results, colors),
        course=draw_metric(results, colors, run.evaluation.metric, goal),
        paths=_draw_paths(study.folder, results, colors),
        explorations=[draw_exploration(record) for record in explored],
        factors=[record["factor"] for record in results[0].tried],
        seeds=len(results[0].runs),
    )
    return "\n".join([verdict, *advice, str(page)])


def describe_verdict(results: Sequence[PolicyResult], metric: str) -> str:
    """Say in a sentence or two what came out."""
    best = results[0]
    if best.value is None:
        return "No policy trained through with every seed; the table below says what happened."
    spread = "" if best.deviation is None else f" ± {best.deviation:.4f} over {len(best.runs)} seeds"
    first = f"Best is {best.policy}: {metric} {best.value:.4f}{spread} on the valid split."
    others = [result for result in results[1:] if result.value is not None]
    if not others:
        return first
    tied = [result.policy for result in others if not can_be_told_apart(best, result)]
    if best.deviation is None:
        return f"{first} With one seed, nothing tells whether that is more than luck: raise --seeds."
    if len(tied) == len(others):
        return f"{first} None of the others can be told from it (two standard errors): the choice matters little here."
    if tied:
        return f"{first} Within two standard errors of it: {', '.join(tied)}."
    return f"{first} It is ahead of all others by more than two standard errors."


def describe_advice(results: Sequence[PolicyResult], policies: Mapping[str, Policy], run: RunConfig) -> list[str]:
    """Say what to do, one sentence each."""
    best = results[0]
    if best.value is None:
        return ["Lower the learning rates, or give smaller --factors."]
    factor = best.runs[0]["factor"]
    policy = policies[best.policy]
    reset = "" if policy.keeps_schedules else ", with no other schedule"
    sentences = [f"Train with {' '.join(policy.list_flags(run, factor))}{reset}."]
    if policy.moves_only_tables:
        sentences.append(f"{policy.name} finds the dense part's rate by itself: its factor moved the tables' alone.")
    if best.deviation is None:
        return sentences
    tied = [r for r in results if r.value is not None and not can_be_told_apart(best, r)]
    steady = [(gap, r.policy) for r in tied if (gap := r.mean("gap")) is not None]
    if len(steady) > 1 and (least := min(steady))[1] != best.policy:
        sentences.append(
            f"Of those that cannot be told apart, {least[1]} has the smallest gap between test and train loss, "
            f"{least[0]:+.4f}: prefer it where runs are long or data few."
        )
    return sentences


def list_warnings(results: Sequence[PolicyResult], explored: Sequence[Record]) -> list[str]:
    """Say what should not be overlooked."""
    warnings = []
    for result in results:
        every = (*result.tried, *result.runs)
        diverged = sum(bool(record["diverged"]) for record in every)
        if diverged:
            warnings.append(f"{result.policy}: {diverged} of {len(every)} runs diverged.")
        tried = sorted(record["factor"] for record in result.tried)
        if tried and result.factor in (tried[0], tried[-1]):
            last, side = ("lowest", "lower") if result.factor == tried[0] else ("highest", "higher")
            warnings.append(
                f"{result.policy}: its best factor, {result.factor:g}, is the {last} tried; give {side} ones "
                "with --factors before you believe its rank."
            )
    if any(not record["has_turned"] for record in explored):
        warnings.append("The range test's loss had not turned at its greatest factor: raise --range-span.")
    return warnings


def _describe_row(
    result: PolicyResult, policy: Policy, goal: float | None, study: StudyFolder, run: RunConfig
) -> dict[str, Any]:
    higher_is_better = run.evaluation.metric == "auc"
    samples = None if goal is None else result.samples_to(goal, higher_is_better=higher_is_better)
    explored = study.records.get(f"{result.policy}/explore")
    steps = [_steps_to(record, samples) for record in result.runs] if samples is not None else []
    return {
        "name": result.policy,
        "family": policy.family,
        "words": policy.words,
        "factor": result.runs[0]["factor"] if result.runs else result.factor,
        "value": result.value,
        "deviation": result.deviation,
        "samples": samples,
        "steps": float(np.mean(steps)) if steps else None,
        "explored": explored["samples"] if explored else 0,
        **{key: result.mean(key) for key in ("test_auc", "test_logloss", "gap", "confidence", "confidence_deviation")},
    }


def _steps_to(record: Record, samples: float) -> float:
    known = [(0.0, 0.0), *((rate[1], rate[0]) for rate in record["rates"])]
    return float(np.interp(samples, [k[0] for k in known], [k[1] for k in known]))


def _draw_paths(folder: Path, results: Sequence[PolicyResult], colors: dict[str, str]) -> Any:
    found = []
    for result in results:
        path = folder / RUNS / result.runs[0]["trial"] / PATH if result.runs else folder / PATH
        if path.is_file():
            weights = np.load(path)
            if len(weights) > 1 and np.isfinite(weights).all():
                found.append((result, weights))
    if not found:
        return None
    planes, shares = project_paths([weights for _, weights in found])
    return draw_paths([result for result, _ in found], planes, shares, colors)


def _list_figures(results: Sequence[PolicyResult], goal: float | None, metric: str) -> list[dict[str, str]]:
    best = results[0]
    gap, confidence = best.mean("gap"), best.mean("confidence")
    return [
        {"label": "Best policy", "value": best.policy, "note": f"of {len(results)}"},
        {
            "label": f"{metric} on the valid split",
            "value": "-" if best.value is None else f"{best.value:.4f}",
            "note": "" if best.deviation is None else f"± {best.deviation:.4f} over seeds",
        },
        {
            "label": "Gap, test less train loss",
            "value": "-" if gap is None else f"{gap:+.4f}",
            "note": "of the best policy",
        },
        {
            "label": "Goal",
            "value": "-" if goal is None else f"{metric} {format_significant(goal, 4)}",
            "note": "" if confidence is None else f"confidence where right {confidence:.3f}",
        },
    ]

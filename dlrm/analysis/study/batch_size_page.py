"""The page of a batch-size study: what batch to take, in words, then the curves that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.analysis.study.batch_size_charts import draw_parameters, draw_samples, draw_steps
from dlrm.analysis.study.critical_batch import (
    WITHIN,
    CriticalBatch,
    explained_share,
    find_most_useful,
    fit_critical_batch,
    range_over_subsets,
)
from dlrm.analysis.study.held_settings import list_held
from dlrm.analysis.study.page import METRICS, format_significant, write_study_page
from dlrm.analysis.study.space import Space, read_setting
from dlrm.analysis.study.steps_to_result import BatchResult, Protocol
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.config import RunConfig

# Below, a fit says nothing: a line goes through any two points.
LEAST_SIZES = 3
TEMPLATE = Path(__file__).parent / "page" / "batch_size.html"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the results say together.

    Attributes:
        believed: results that have a part in the fit, in the order of batches.
        fit: the law; None where none fits.
        why_none: why not.
        span: least and greatest critical batch over fits that leave out one batch size; None where unknown.
        explained: R^2 of the fitted steps, over logarithms.
        most_useful: largest batch up to which each one saves steps; None where fewer than two are believed.
    """

    believed: tuple[BatchResult, ...]
    fit: CriticalBatch | None
    why_none: str
    span: tuple[float, float] | None
    explained: float | None
    most_useful: int | None

    @property
    def outside(self) -> str:
        """Whether the critical batch lies `above` or `below` what was measured; "" if neither."""
        if self.fit is None:
            return ""
        if self.fit.critical_batch > self.believed[-1].batch_size:
            return "above"
        return "below" if self.fit.critical_batch < self.believed[0].batch_size else ""

    @property
    def bound(self) -> int:
        """The measured batch that a critical batch `outside` lies beyond."""
        return self.believed[-1 if self.outside == "above" else 0].batch_size


def find_out(results: Sequence[BatchResult]) -> Findings:
    """Fit the critical batch to what is believed, the results in the order of batches."""
    believed = tuple(result for result in results if not result.rejected and result.samples is not None)
    batches, samples = [r.batch_size for r in believed], [r.samples or 0.0 for r in believed]
    fit, why_none = None, ""
    try:
        if len(believed) < LEAST_SIZES:
            raise ValueError(f"expected at least {LEAST_SIZES} batch sizes that are believed, got {len(believed)}")
        fit = fit_critical_batch(batches, samples, relative=True)
    except ValueError as error:
        why_none = str(error)
    return Findings(
        believed=believed,
        fit=fit,
        why_none=why_none,
        span=None if fit is None else range_over_subsets(batches, samples, relative=True),
        explained=None if fit is None else explained_share(fit, batches, samples),
        most_useful=find_most_useful(batches, [r.steps or 0.0 for r in believed]) if len(believed) > 1 else None,
    )


def write_batch_size_page(
    study: StudyFolder, results: Sequence[BatchResult], protocol: Protocol, space: Space, run: RunConfig, *, name: str
) -> str:
    """Write the page into the study's folder, and return the verdict and where the page lies."""
    found = find_out(results)
    verdict, advice = describe_verdict(found), describe_advice(found, run)
    goal = f"{METRICS[run.evaluation.metric]} {protocol.goal:.5g} on the valid split"
    page = write_study_page(
        study.folder,
        TEMPLATE,
        kind=study.kind,
        title=f"{name}: which batch size?",
        verdict=verdict,
        advice=advice,
        warnings=list_warnings(results, found, study),
        figures=_list_figures(found, goal),
        goal=goal,
        protocol=protocol,
        results=results,
        fit=found.fit,
        why_none=found.why_none,
        within=WITHIN,
        explained=found.explained,
        steps=draw_steps(results, found.fit),
        samples=draw_samples(results, found.fit),
        parameters=[draw_parameters(dimension, results, study.records) for dimension in space],
        space=space,
    )
    return "\n".join([verdict, *advice, str(page)])


def describe_verdict(found: Findings) -> str:
    """Say in a sentence or two what came out."""
    if not found.believed:
        return "No batch size came to the goal in a way that can be believed; the table below says why not."
    if found.fit is None:
        words = f"No critical batch could be fitted ({found.why_none.removeprefix('critical batch: ')})."
        if found.most_useful is None:
            return words
        return f"{words} Of the batches tried, {found.most_useful:,} is the largest that still saved steps."
    fit = found.fit
    span = "" if found.span is None else f" ({_round(found.span[0])} to {_round(found.span[1])}, leaving one size out)"
    if found.outside:
        return (
            f"The critical batch lies {found.outside} what was measured: the law, carried on beyond {found.bound:,}, "
            f"has it at about {_round(fit.critical_batch)} samples{span}, which nothing here has tested."
        )
    return (
        f"The critical batch is about {_round(fit.critical_batch)} samples{span}: there a run takes twice the samples "
        f"of the smallest batch and twice the steps of the largest. Up to {_round(fit.perfect_up_to)}, twice the batch "
        f"is half the steps; beyond {_round(fit.maximal_from)}, a larger one saves next to nothing."
    )


def describe_advice(found: Findings, run: RunConfig) -> list[str]:
    """Say what to do, one sentence each."""
    if not found.believed:
        return ["Lower --goal, raise --epochs or --trials, or give other ranges with --space."]
    sentences = []
    if found.outside:
        kind = "larger" if found.outside == "above" else "smaller"
        sentences.append(f"To measure the critical batch, add {kind} sizes to --batches.")
    elif found.fit is not None:
        sentences += _advise_by_law(found, found.fit, run)
    if found.most_useful is not None:
        sentences.append(
            f"Larger than {found.most_useful:,} is of no use: the next batch tried took no fewer steps."
            if found.most_useful < found.believed[-1].batch_size
            else f"Even {found.most_useful:,}, the largest batch that is believed, still saved steps."
        )
    if len(found.believed) < LEAST_SIZES:
        sentences.append(f"For a critical batch, have at least {LEAST_SIZES} sizes in --batches that can be believed.")
    sentences += [
        f"Between the smallest and the largest batch, the best {name} went with the batch to the power {power:.2f} "
        "(linear scaling is 1, the square-root rule .5)."
        for name in ("dense.learning_rate", "tables.learning_rate")
        if (power := fit_power(found.believed, name)) is not None
    ]
    return sentences


def _advise_by_law(found: Findings, fit: CriticalBatch, run: RunConfig) -> list[str]:
    best = min(found.believed, key=lambda result: abs(np.log(result.batch_size / fit.critical_batch)))
    given = dict(list_held(run, best.batch_size)) | best.parameters
    settings = " ".join(f"{flag} {value}" for flag, value in list_flags(given, run))
    return [
        f"Where time counts as much as compute, train with --step.global-batch-size {best.batch_size} {settings}: "
        f"{fit.samples(best.batch_size) / fit.least_samples:.1f} times the least samples, "
        f"{fit.steps(best.batch_size) / fit.least_steps:.1f} times the least steps.",
        "Where only compute counts, take the largest batch that fills the machine and is not above "
        f"{_round(fit.perfect_up_to)}.",
    ]


def fit_power(results: Sequence[BatchResult], name: str) -> float | None:
    """Return the exponent with which a best hyperparameter goes with the batch; None below three batch sizes."""
    points = [(r.batch_size, r.parameters[name]) for r in results if r.parameters.get(name, 0) > 0]
    if len(points) < 3:
        return None
    batches, values = np.log(np.asarray(points)).T
    return float(np.polyfit(batches, values, 1)[0])


def list_flags(parameters: dict[str, float], run: RunConfig) -> list[tuple[str, str]]:
    """Return hyperparameters as flags of `recforge train`, with their values."""
    flags = []
    for name, value in parameters.items():
        for path in name.split("+"):
            whole = isinstance(read_setting(run, path), int)
            flags.append((f"--{path.replace('_', '-')}", f"{value:.0f}" if whole else f"{value:.3g}"))
    return flags


def list_warnings(results: Sequence[BatchResult], found: Findings, study: StudyFolder) -> list[str]:
    """Say what should not be overlooked."""
    warnings = []
    if len(found.believed) < LEAST_SIZES:
        warnings.append(
            f"Batch sizes that are believed: {len(found.believed)}. The law has two numbers, so that it goes through "
            f"any two points; below {LEAST_SIZES} it is not fitted."
        )
    if found.outside:
        warnings.append(
            f"The critical batch lies {found.outside} the measured batches, {found.believed[0].batch_size:,} to "
            f"{found.believed[-1].batch_size:,}: it is what the law says, not what was seen."
        )
    warnings += [f"Batch {r.batch_size:,} has no part in the fit: {r.rejected}." for r in results if r.rejected]
    diverged = [f"{r.diverged} of {r.trials} at batch {r.batch_size:,}" for r in results if r.diverged]
    if diverged:
        warnings.append(f"Trials that diverged: {', '.join(diverged)}.")
    warnings += [
        f"Batch {r.batch_size:,}: {sum(s is None for s in r.repeated)} of {len(r.repeated)} repeats did not come to "
        "the goal; the mean is that of the others."
        for r in results
        if None in r.repeated and not r.rejected
    ]
    coarse = {
        record["batch_size"]
        for record in study.records.values()
        if record.get("samples") is not None and len(record.get("course", ())) == 1
    }
    if coarse:
        sizes = ", ".join(f"{size:,}" for size in sorted(coarse))
        warnings.append(
            f"Trials of batch {sizes} came to the goal before their first evaluation: raise --evaluations or --goal."
        )
    return warnings


def _list_figures(found: Findings, goal: str) -> list[dict[str, str]]:
    fit = found.fit
    critical = "-" if fit is None else _round(fit.critical_batch)
    metric, _, where = goal.partition(" on ")
    return [
        {"label": "Goal", "value": metric, "note": f"on {where}"},
        {
            "label": "Critical batch",
            "value": f"{found.outside} {found.bound:,}" if found.outside else critical,
            "note": f"{critical}, were the law to hold there" if found.outside else "twice the least samples and steps",
        },
        {
            "label": "Least samples",
            "value": "-" if fit is None else _round(fit.least_samples),
            "note": "with ever smaller batches, fitted",
        },
        {
            "label": "Least steps",
            "value": "-" if fit is None else _round(fit.least_steps),
            "note": "with ever larger batches, fitted",
        },
    ]


def _round(number: float) -> str:
    return format_significant(number, 2 if number < 1e3 else 3)

"""Says in words what a run's numbers say: how good the model is, what to look at, and where the time went."""

from __future__ import annotations

import time
from typing import Any

from dlrm.analysis import ranking
from dlrm.analysis.quantities import format_bytes, format_count, format_duration, format_number, format_share
from dlrm.analysis.run_folder import Record, Run
from dlrm.metrics.metrics import is_at_chance

CALIBRATION_TOLERANCE = 0.1


def describe_quality(run: Run) -> str:
    """Say how well the model ranks, in one or two sentences."""
    record = run.last_measured
    if record is None:
        return "Nothing has been measured on held-out rows yet."
    if ranking.is_ranked(record):
        return ranking.describe_quality(record, run.measured_split)
    if record.get("auc") is None:
        return f"The AUC on the {run.measured_split} split is not defined: {record.get('undefined') or 'no number'}."
    where = f"{format_count(record['split_samples'])} rows of the {run.measured_split} split"
    if run.summary is None:
        where += f", measured after {format_count(record['samples'])} training samples"
    text = f"AUC {record['auc']:.4f} on {where}."
    if record.get("bayes_auc") is not None:
        text += (
            f" The best possible is {record['bayes_auc']:.4f}: the model has learned "
            f"{format_share(record.get('recovered_auc'))} of what can be learned beyond chance."
        )
    return text


def describe_course(run: Run) -> str:
    """Say how far the run went, how fast, and why it ended."""
    speed = run.samples / run.seconds if run.seconds else None
    text = f"{format_count(run.samples)} training samples in {format_duration(run.seconds)}"
    text += f", {format_count(speed)} per second" if speed else ""
    if run.summary is None:
        return f"{text} so far."
    text += f", with {format_bytes(run.summary.get('peak_rss_bytes'))} of memory at most. Why it ended: "
    text += f"{run.summary.get('stopped', 'unknown')}."
    best = run.summary.get("best_samples")
    if run.validation and best and best < run.samples:
        text += f" The best weights were those after {format_count(best)} samples."
    return text


def describe_unfinished(run: Run) -> str | None:
    """Say what is known of a run without a summary; None for a finished one."""
    if run.summary is not None:
        return None
    if run.stopped is not None:
        return f"This run stopped: {run.stopped}. The command that started it continues it from its last checkpoint."
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.written_at))
    return (
        f"This run is not finished: it is still going, or it was killed. Its last "
        f"sign of life is of {moment}. The command that started it continues it from its last checkpoint."
    )


def list_complaints(run: Run) -> list[str]:
    """Return what the reader should not overlook, a sentence each; most is what the loop's guards look at."""
    complaints = []
    broken = [record["samples"] for record in run.training if record["loss"] is None]
    if broken:
        complaints.append(f"The loss was not a finite number before {format_count(broken[0])} samples.")
    record = run.last_measured
    if record is None:
        return complaints
    if ranking.is_ranked(record):
        return complaints + ranking.list_complaints(record)
    if record.get("undefined"):
        complaints.append(f"Some metrics of the {run.measured_split} split are not defined: {record['undefined']}.")
    if record.get("prediction_std") == 0:
        complaints.append("Every prediction is the same; the model cannot tell samples apart.")
    elif is_at_chance(record["auc"], record["positives"], record["split_samples"]):
        complaints.append(f"An AUC of {record['auc']:.4f} on so few rows cannot be told from chance.")
    calibration = record.get("calibration")
    if calibration is not None and abs(calibration - 1) > CALIBRATION_TOLERANCE:
        direction = "too high" if calibration > 1 else "too low"
        complaints.append(f"Predictions are {direction} on average: {calibration:.2f} times the share of positives.")
    return complaints


def describe_calibration(record: Record) -> list[str]:
    """Say how predicted and observed shares compare, overall and where they differ most."""
    mean, calibration = record.get("mean_prediction"), record.get("calibration")
    sentences = []
    if mean is not None and calibration:
        sentences.append(
            f"The model predicts {format_share(mean)} positives on average, and {format_share(mean / calibration)} "
            f"there are: a calibration of {calibration:.3f}, where 1 is right, more is too high and less is too low."
        )
    bins = record.get("calibration_curve") or []
    if bins:
        worst = max(bins, key=lambda b: abs(b["mean_prediction"] - b["mean_label"]))
        sentences.append(
            f"Furthest apart are {format_count(worst['samples'])} rows that were predicted at "
            f"{format_share(worst['mean_prediction'])} on average; "
            f"{format_share(worst['mean_label'])} of them are positive."
        )
    return sentences


def list_figures(run: Run) -> list[dict[str, Any]]:
    """Return the numbers at the top of the page: label, value, and a line on how to read it."""
    record = run.last_measured or {}
    summary = run.summary or {}
    speed = run.samples / run.seconds if run.seconds else None
    quality = ranking.list_figures(record) if ranking.is_ranked(record) else _list_click_figures(record)
    return [
        *quality,
        {"label": "Samples", "value": format_count(run.samples), "note": "seen in training"},
        {"label": "Training time", "value": format_duration(run.seconds), "note": "without evaluation"},
        {"label": "Speed", "value": format_count(speed), "note": "samples per second"},
        {
            "label": "Peak memory",
            "value": format_bytes(summary.get("peak_rss_bytes")),
            "note": "of the process" if run.summary else "known at the end",
        },
    ]


def _list_click_figures(record: Record) -> list[dict[str, Any]]:
    best = record.get("bayes_auc")
    return [
        {
            "label": "AUC",
            "value": format_number(record.get("auc")),
            "note": f"best possible {best:.4f}" if best is not None else "0.5 is chance, 1 is perfect",
        },
        {"label": "Log loss", "value": format_number(record.get("logloss")), "note": "nats per row"},
        {
            "label": "Normalised entropy",
            "value": format_number(record.get("normalized_entropy")),
            "note": "1 is predicting the average",
        },
        {"label": "Calibration", "value": format_number(record.get("calibration"), 3), "note": "predicted / observed"},
    ]

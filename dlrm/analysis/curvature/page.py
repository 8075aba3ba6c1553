"""The page of a study of curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlrm.analysis.curvature import pictures, verdict
from dlrm.analysis.curvature.findings import NEGATIVE, Finding, Line, Records, read_finding, read_line
from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.quantities import format_count, format_share
from dlrm.analysis.study.page import format_significant, write_study_page

CLOSE = 1e-3  # an error that three digits do not show
TEMPLATE = Path(__file__).parent / "page" / "curvature.html"


def write_curvature_page(
    folder: Path, config: CurvatureConfig, runs: Sequence[Mapping[str, Any]], records: Records
) -> Path:
    """Write the page into the study's folder, and return where it lies.

    Args:
        folder: of the study.
        config: of the study.
        runs: their configurations.
        records: of all trials.
    """
    findings = [read_finding(number, config, run, records) for number, run in enumerate(runs, start=1)]
    line = read_line(config, records)
    whose = "the dense part" if config.weights == "dense" else "the dense part and the rows that the sample touches"
    return write_study_page(
        folder,
        TEMPLATE,
        kind="curvature",
        title="How the loss is curved" + (" around two solutions" if len(runs) == 2 else ""),
        verdict=verdict.describe(findings, line),
        advice=verdict.advise(findings),
        warnings=verdict.list_warnings(findings, line),
        figures=_figures(findings),
        findings=findings,
        rows=_rows(findings, line, config),
        run_folders=[str(run) for run in config.runs],
        samples=config.samples,
        whose=whose,
        density=pictures.draw_density(findings),
        curves=pictures.draw_curves(findings, config.reach),
        line=pictures.draw_line(line),
        landscapes=pictures.draw_landscapes(findings, config.reach),
    )


def _figures(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return the numbers at the top: of one run, or of both side by side."""

    def both(values: Sequence[float | None]) -> str:
        return " / ".join(format_significant(value) for value in values)

    order = "run 1 / run 2" if len(findings) == 2 else ""
    figures = [
        ("Largest eigenvalue", both([finding.largest[0] for finding in findings]), order or "steepest direction"),
        ("Smallest eigenvalue", both([finding.smallest[0] for finding in findings]), order or "below 0: downhill"),
    ]
    if all(finding.trace for finding in findings):
        traces = [finding.trace[0] for finding in findings if finding.trace]
        figures.append(("Trace", both(traces), order or "sum of all eigenvalues"))
    sizes = list(findings[0].sharpness)[:1]
    for size in sizes:
        percent = both([finding.sharpness[size] for finding in findings])
        figures.append(("Sharpness, %", percent, f"box {size:g}" + (f", {order}" if order else "")))
    return [{"label": label, "value": value, "note": note} for label, value, note in figures]


def _rows(findings: Sequence[Finding], line: Line | None, config: CurvatureConfig) -> list[tuple[str, list[str]]]:
    """Return the table: what it is, and its value for every run."""

    def give_or_take(pair: tuple[float, float] | None) -> str:
        if pair is None:
            return "-"
        value, error = pair
        is_close = not error > CLOSE * abs(value)  # nor is an error that is not known
        return format_significant(value) + ("" if is_close else f" ± {format_significant(error, 1)}")

    rows = [
        ("batch size in training", [format_count(finding.batch_size) for finding in findings]),
        ("loss on the sample", [format_significant(finding.loss, 4) for finding in findings]),
        ("largest eigenvalue", [give_or_take(finding.largest) for finding in findings]),
        ("smallest eigenvalue", [give_or_take(finding.smallest) for finding in findings]),
        ("trace", [give_or_take(finding.trace) for finding in findings]),
        (
            f"share of eigenvalues below {-NEGATIVE:g} of the largest",
            [format_share(finding.share_negative) for finding in findings],
        ),
    ]
    if line is not None:
        rows[2:2] = [
            (f"loss on {split} rows", [format_significant(loss, 4) for loss in line.ends(split)])
            for split in line.losses
            if split != "train"
        ]
    for size in config.sharpness:
        name = f"sharpness in a box of {size:g}, %"
        rows.append((name, [format_significant(finding.sharpness[size]) for finding in findings]))
    rows += [
        ("norm of the weights", [format_significant(finding.norm) for finding in findings]),
        ("number of weights", [format_count(finding.num_weights) for finding in findings]),
        ("products with the Hessian", [format_count(finding.products) for finding in findings]),
    ]
    return rows

"""`recforge report`: a run's folder as one self-contained HTML page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dlrm.analysis import bottleneck, curves, diagrams, embedding_space, noise, ranking, verdict
from dlrm.analysis.html_page import TEMPLATES, render_page, write_page
from dlrm.analysis.quantities import format_bytes, format_count, format_number, format_setting, format_share
from dlrm.analysis.run_folder import Record, Run, read_run
from dlrm.cli import parse

PAGE = "report.html"


def split_at_flags(text: str) -> list[str]:
    """Take a sentence apart so that every second part is a flag."""
    return re.split(r"(--[\w.-]*\w)", text)


FILTERS: dict[str, Callable[..., Any]] = {
    "bytes": format_bytes,
    "count": format_count,
    "number": format_number,
    "setting": format_setting,
    "share": format_share,
    "split_at_flags": split_at_flags,
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report, and where."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The folder that `recforge train --output` named; the run need not be finished."""
    output: Path | None = None
    """The page to write; None means report.html in the run's folder."""


def run_report(argv: list[str]) -> int:
    """Write the report that `argv` asks for."""
    config = parse(
        ReportConfig,
        argv,
        program="recforge report",
        description="Write a run as one HTML page, which needs nothing else and no network.",
    )
    print(write_report(config.run, config.output))
    return 0


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of the run in `folder`, and return where it lies.

    Args:
        folder: of the run, finished or not.
        output: the page; `report.html` in `folder` if None.

    Raises:
        ValueError: `folder` holds no run, or `output` cannot be a file.
    """
    run = read_run(folder)
    output = output or folder / PAGE
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"--output: expected a file in a folder that exists, got {output}")
    write_page(render(run), output)
    return output


def render(run: Run) -> str:
    """Return a run's page."""
    stages = bottleneck.share_out_time(run)
    record = run.last_measured
    spread, is_ranked = bottleneck.spread_over_ranks(run), ranking.is_ranked(record)
    held_up = bottleneck.describe_bottleneck(stages, spread, of_sequences=is_ranked) if stages else None
    return render_page(
        TEMPLATES / "report.html",
        FILTERS,
        run=run,
        record=record,
        quality=verdict.describe_quality(run),
        course=verdict.describe_course(run),
        unfinished=verdict.describe_unfinished(run),
        complaints=verdict.list_complaints(run),
        figures=verdict.list_figures(run),
        curves=curves.list_curves(run),
        ranked=is_ranked,
        noise=noise.describe_noise(run),
        space=embedding_space.describe_space(run),
        calibration=diagrams.draw_calibration(record),
        calibration_words=verdict.describe_calibration(record) if record else [],
        stages=diagrams.draw_stages(run),
        bottleneck=held_up,
        throughput=curves.draw_throughput(run),
        waits=curves.draw_waits(run),
        segments=diagrams.draw_segments(run),
        segment_by=run.config.get("evaluation", {}).get("segment_by"),
        table_total=sum_up_tables(run.tables),
        settings=group_settings(run.config),
    )


def sum_up_tables(tables: list[Record]) -> Record:
    """Return rows, bytes and trained rows of all tables; trained rows are None where a table does not tell."""
    trained = [table["trained_rows"] for table in tables]
    return {
        "num_rows": sum(table["num_rows"] for table in tables),
        "bytes": sum(table["bytes"] for table in tables),
        "trained_rows": None if None in trained else sum(trained),
    }


def group_settings(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the configuration as (group, settings), first the settings that belong to none."""
    alone = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    groups = [(name, list(value.items())) for name, value in config.items() if isinstance(value, dict)]
    return ([("run", alone)] if alone else []) + groups

"""What the pages of all studies have in common: a verdict in words on top, then what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlrm.analysis import report
from dlrm.analysis.html_page import render_page, write_page

PAGE = "report.html"
METRICS = {"auc": "AUC", "logloss": "log loss", "normalized_entropy": "normalised entropy"}


def format_significant(number: float | None, digits: int = 3) -> str:
    """Write a number with so many digits that count, thousands set apart, as 0.00123, 45.6 or 1,230,000."""
    if number is None:
        return "-"
    if number and not 1e-4 <= abs(number) < 1e15:
        return f"{number:.{digits - 1}e}"
    text = f"{float(f'{number:.{digits}g}'):,.10f}"
    return text.rstrip("0").rstrip(".")


FILTERS: dict[str, Callable[..., Any]] = {**report.FILTERS, "significant": format_significant}


def write_study_page(
    folder: Path,
    template: Path,
    *,
    kind: str,
    title: str,
    verdict: str,
    advice: Sequence[str] = (),
    warnings: Sequence[str] = (),
    figures: Sequence[dict[str, str]] = (),
    **values: Any,
) -> Path:
    """Write a study's page into its folder, and return where it lies.

    Args:
        folder: of the study.
        template: extends `study.html`, and fills its block `main`.
        kind: of the study.
        title: the page's heading.
        verdict: what came out, in a sentence for who reads no more than that.
        advice: what to do with it, one sentence each.
        warnings: what should not be overlooked, one sentence each.
        figures: at most four, each with `label`, `value` and `note`.
        values: of the template's other variables; charts are drawn by the macro `draw`.
    """
    words = {"verdict": verdict, "advice": list(advice), "warnings": list(warnings), "figures": list(figures)}
    text = render_page(template, FILTERS, kind=kind, title=title, folder=str(folder), **words, **values)
    write_page(text, folder / PAGE)
    return folder / PAGE

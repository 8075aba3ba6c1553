"""The charts of a batch-size study: steps, samples and best hyperparameters against the batch size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, dashed_line, lay_out
from dlrm.analysis.study.critical_batch import DIMINISHING, MAXIMAL, PERFECT, CriticalBatch
from dlrm.analysis.study.space import Dimension
from dlrm.analysis.study.steps_to_result import BatchResult
from dlrm.analysis.study.study_folder import Record

SHADES = {PERFECT: "rgba(42,157,111,.14)", DIMINISHING: "rgba(59,125,216,.10)", MAXIMAL: "rgba(201,116,31,.14)"}


def draw_steps(results: Sequence[BatchResult], fit: CriticalBatch | None) -> Chart:
    """Return steps to the goal against the batch size, with the fitted law and its regions."""
    points = [(r, r.steps, (r.spread or 0.0) / r.batch_size) for r in results if r.steps is not None]
    law = None if fit is None else fit.steps
    spoken = ", ".join(f"{steps:,.0f} at {r.batch_size:,}" for r, steps, _ in points)
    return _draw("steps", "Steps to the goal", "steps", f"Steps against batch size: {spoken}.", points, law, fit, 420)


def draw_samples(results: Sequence[BatchResult], fit: CriticalBatch | None) -> Chart:
    """Return samples to the goal against the batch size, with the fitted law and its regions."""
    points = [(r, r.samples, r.spread or 0.0) for r in results if r.samples is not None]
    law = None if fit is None else fit.samples
    spoken = ", ".join(f"{samples:,.0f} at {r.batch_size:,}" for r, samples, _ in points)
    words = f"Samples against batch size: {spoken}."
    return _draw("samples", "Samples to the goal", "samples", words, points, law, fit, 300)


def draw_parameters(dimension: Dimension, results: Sequence[BatchResult], records: Mapping[str, Record]) -> Chart:
    """Return every trial's value of one hyperparameter against the batch size, and the best ones."""
    tried = [r for r in records.values() if dimension.name in r.get("parameters", {})]
    groups = {
        "came to the goal": (GREY, "circle", [r for r in tried if r["samples"] is not None]),
        "did not": (ORANGE, "x-thin", [r for r in tried if r["samples"] is None]),
    }
    traces = [
        go.Scatter(
            name=name,
            x=[record["batch_size"] for record in group],
            y=[record["parameters"][dimension.name] for record in group],
            mode="markers",
            marker={"color": color, "size": 6, "symbol": symbol, "opacity": 0.7, "line": {"color": color, "width": 1}},
            hovertemplate=f"%{{y:.4~g}}, {name}<br>batch %{{x:,}}<extra></extra>",
        )
        for name, (color, symbol, group) in groups.items()
    ]
    best = [(r.batch_size, r.parameters[dimension.name]) for r in results if r.parameters]
    traces.append(
        go.Scatter(
            name="best",
            x=[batch for batch, _ in best],
            y=[value for _, value in best],
            mode="lines+markers",
            line={"color": BLUE, "width": 1.5},
            marker={"color": BLUE, "size": 9},
            hovertemplate="best: %{y:.4~g}<br>batch %{x:,}<extra></extra>",
        )
    )
    layout = _lay_out_batches([r.batch_size for r in results])
    values = [record["parameters"][dimension.name] for record in tried]
    layout["yaxis"] |= _log_axis(values) if dimension.log else {"rangemode": "tozero"}
    spoken = ", ".join(f"{value:.3g} at {batch:,}" for batch, value in best)
    return Chart(
        name="parameter-" + re.sub(r"[\W_]+", "-", dimension.name),
        title=dimension.name.replace("+", " and "),
        description=f"Best {dimension.name} against batch size: {spoken}.",
        figure=as_figure(traces, layout),
        legend=((BLUE, "the best"), (ORANGE, "did not come to the goal")),
        height=260,
    )


def _draw(
    name: str,
    title: str,
    unit: str,
    description: str,
    points: Sequence[tuple[BatchResult, float, float]],
    law: Any,
    fit: CriticalBatch | None,
    height: int,
) -> Chart:
    """Return a chart of both logarithms.

    Args:
        name: of the chart.
        title: its heading.
        unit: of what is drawn.
        description: for who does not see it.
        points: result, value and its standard deviation.
        law: the fitted value as a function of the batch size; None if there is none.
        fit: whose regions are shaded.
        height: in pixels.
    """
    batches = [result.batch_size for result, _, _ in points]
    layout = _lay_out_batches(batches)
    layout["yaxis"] |= _log_axis([value for _, value, _ in points])
    traces: list[Any] = []
    if law is not None and fit is not None:
        low, high = min(batches) / 1.5, max(batches) * 1.5
        x = np.geomspace(low, high, 80).tolist()
        traces.append(dashed_line("fitted", x, [law(batch) for batch in x]))
        layout |= _shade(fit, low, high)
        layout["xaxis"] |= {"range": [float(np.log10(low)), float(np.log10(high))]}
    for label, is_believed in (("measured", True), ("not believed", False)):
        chosen = [point for point in points if bool(point[0].rejected) != is_believed]
        if chosen:
            traces.append(_draw_points(label, unit, chosen, GREEN if is_believed else ORANGE, is_believed))
    legend = [(GREEN, "measured, with the standard deviation over repeats"), (GREY, "fitted")]
    if any(result.rejected for result, _, _ in points):
        legend.insert(1, (ORANGE, "not believed, no part in the fit"))
    figure = as_figure(traces, layout)
    return Chart(name=name, title=title, description=description, figure=figure, legend=tuple(legend), height=height)


def _draw_points(
    label: str, unit: str, points: Sequence[tuple[BatchResult, float, float]], color: str, is_believed: bool
) -> go.Scatter:
    return go.Scatter(
        name=label,
        x=[result.batch_size for result, _, _ in points],
        y=[value for _, value, _ in points],
        mode="markers",
        marker={"color": color, "size": 9, "symbol": "circle" if is_believed else "circle-open"},
        error_y={"type": "data", "array": [spread for _, _, spread in points], "color": color, "thickness": 1.5},
        hovertemplate=f"%{{y:,.4~g}} {unit}<br>batch %{{x:,}}, {label}<extra></extra>",
    )


def _shade(fit: CriticalBatch, low: float, high: float) -> dict[str, Any]:
    """Return what marks the regions between two batch sizes, and the critical batch."""
    ends = {
        PERFECT: (low, fit.perfect_up_to),
        DIMINISHING: (fit.perfect_up_to, fit.maximal_from),
        MAXIMAL: (fit.maximal_from, high),
    }
    shapes: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for region, (start, end) in ends.items():
        left, right = max(start, low), min(end, high)
        if left >= right:
            continue
        area = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
        shapes.append(area | {"x0": left, "x1": right, "fillcolor": SHADES[region], "layer": "below"})
        place = {"xref": "x", "yref": "paper", "x": float(np.log10(left * right) / 2), "y": 1, "yanchor": "top"}
        if np.log(right / left) > np.log(high / low) / 8:  # else its name would not fit
            annotations.append(place | {"text": region, "showarrow": False, "font": {"size": 11}})
    if low < fit.critical_batch < high:
        line = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1}
        dots = {"color": GREY, "width": 1, "dash": "dot"}
        shapes.append(line | {"x0": fit.critical_batch, "x1": fit.critical_batch, "line": dots})
        place = {"xref": "x", "yref": "paper", "x": float(np.log10(fit.critical_batch)), "y": 0, "yanchor": "bottom"}
        words = {"text": "critical batch", "xanchor": "left", "showarrow": False, "font": {"size": 11}}
        annotations.append(place | words)
    return {"shapes": shapes, "annotations": annotations}


def _lay_out_batches(batches: Sequence[int]) -> dict[str, Any]:
    layout = lay_out("batch size")
    layout["xaxis"] |= {"type": "log", "tickvals": list(batches), "ticktext": [f"{batch:,}" for batch in batches]}
    return layout


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return an axis of logarithms, with ticks between the powers of ten where there are few of those."""
    decades = float(np.log10(max(values) / min(values))) if values else 0.0
    return {"type": "log", "dtick": "D2" if decades < 1.5 else 1}

"""The charts of a learning-rate study: rates, the metric and the range test over steps; the ways of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, dashed_line, lay_out
from dlrm.analysis.study.compare_policies import PolicyResult
from dlrm.analysis.study.page import METRICS
from dlrm.analysis.study.study_folder import Record

# Each has a contrast of at least 3 to the light and to the dark background.
COLORS = (BLUE, ORANGE, GREEN, "#a45cc8", "#c94f6d", "#2596a8", "#8f7a2e", GREY, "#6a73d9", "#b0603c")
LOGGED_DECADES = 3
Plane = NDArray[np.float64]


def color_policies(results: Sequence[PolicyResult]) -> dict[str, str]:
    """Return a colour for each policy, the same in all charts."""
    return {result.policy: COLORS[number % len(COLORS)] for number, result in enumerate(results)}


def draw_rates(results: Sequence[PolicyResult], colors: dict[str, str]) -> Chart:
    """Return the dense part's learning rate over steps, of the first reported run of each policy."""
    traces, spoken = [], []
    for result in _drawn(results):
        rates = result.runs[0]["rates"]
        traces.append(_line(result.policy, [r[0] for r in rates], [r[2] for r in rates], colors, "%{y:.3~g}"))
        spoken.append(f"{result.policy} at most {max(r[2] for r in rates):.3g}")
    layout = lay_out("steps")
    most = max((rate[2] for result in _drawn(results) for rate in result.runs[0]["rates"]), default=1.0)
    # A decay to 0 has no lower end on this axis.
    ends = [float(np.log10(most)) - LOGGED_DECADES, float(np.log10(most)) + 0.1]
    layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power", "range": ends}
    return Chart(
        name="rates",
        title="Learning rate of the dense part",
        description=f"Learning rate over steps: {', '.join(spoken)}.",
        figure=as_figure(traces, layout),
        legend=_legend(results, colors),
        height=300,
    )


def draw_metric(results: Sequence[PolicyResult], colors: dict[str, str], metric: str, goal: float | None) -> Chart:
    """Return the metric on the valid split over steps, a line for each reported run."""
    traces: list[Any] = []
    ends = [0.0]
    for result in _drawn(results):
        for record in result.runs:
            if not record["course"]:
                continue
            x = _steps_at([samples for samples, _ in record["course"]], record["rates"])
            ends.append(x[-1])
            traces.append(_line(result.policy, x, [value for _, value in record["course"]], colors, "%{y:.4f}"))
    if goal is not None:
        traces.append(dashed_line("goal", [0, max(ends)], [goal, goal]))
    spoken = [f"{r.policy} {r.value:.4f}" for r in results if r.value is not None]
    return Chart(
        name="metric",
        title=f"{METRICS[metric]} on the valid split, a line for each seed",
        description=f"{METRICS[metric]} over steps; the best of each policy: {', '.join(spoken)}.",
        figure=as_figure(traces, lay_out("steps")),
        legend=(*_legend(results, colors), *(((GREY, "goal"),) if goal is not None else ())),
        height=340,
    )


def draw_paths(
    results: Sequence[PolicyResult], planes: Sequence[Plane], shares: tuple[float, float], colors: dict[str, str]
) -> Chart:
    """Return the ways of the dense weights in the plane of their principal components.

    Args:
        results: of policies whose ways are known.
        planes: the way of each [notes, 2].
        shares: of the variance, along either axis.
        colors: of policies.
    """
    traces = []
    for result, plane in zip(results, planes, strict=True):
        sizes = [9, *([4] * (len(plane) - 2)), 11][: len(plane)]
        symbols = ["circle-open", *(["circle"] * (len(plane) - 2)), "star"][: len(plane)]
        trace = _line(result.policy, plane[:, 0].tolist(), plane[:, 1].tolist(), colors, "")
        traces.append(trace.update(mode="lines+markers", marker={"size": sizes, "symbol": symbols}))
    layout = lay_out(f"first principal component, {shares[0]:.0%} of the variance")
    title = {"text": f"second, {shares[1]:.0%}", "standoff": 8, "font": {"size": 12}}
    layout["yaxis"] |= {"title": title, "zeroline": False}
    spoken = ", ".join(
        f"{r.policy} ends at {p[-1, 0]:.2g}, {p[-1, 1]:.2g}" for r, p in zip(results, planes, strict=True)
    )
    return Chart(
        name="paths",
        title="Ways of the dense weights, from the ring to the star",
        description=f"Two principal components of the dense weights: {spoken}.",
        figure=as_figure(traces, layout),
        legend=_legend(results, colors),
        height=420,
    )


def draw_exploration(record: Record) -> Chart:
    """Return a range test: the smoothed training loss against the factor on the learning rates."""
    line = go.Scatter(
        name="smoothed training loss",
        x=record["factors"],
        y=record["losses"],
        mode="lines",
        line={"color": BLUE, "width": 2},
        hovertemplate="loss %{y:.4f}<br>factor %{x:.3~g}<extra></extra>",
    )
    least = min(record["losses"])
    marks = go.Scatter(
        name="suggested and largest",
        x=[record["suggested"], record["largest"]],
        y=[float(np.interp(np.log(record["suggested"]), np.log(record["factors"]), record["losses"])), least],
        mode="markers",
        marker={"color": [GREEN, ORANGE], "size": 10},
        hovertemplate="factor %{x:.3~g}<extra></extra>",
    )
    layout = lay_out("factor on both learning rates")
    layout["xaxis"] |= {"type": "log", "dtick": 1}
    layout["yaxis"] |= {"range": [least - 0.02, min(max(record["losses"]), 2.0 * record["losses"][0]) + 0.02]}
    return Chart(
        name="exploration",
        title="Range test: training loss while the rates rise",
        description=f"The loss falls up to a factor of {record['largest']:.3g}; {record['suggested']:.3g} is taken.",
        figure=as_figure([line, marks], layout),
        legend=((GREEN, f"taken: {record['suggested']:.3g}"), (ORANGE, f"least loss: {record['largest']:.3g}")),
        height=300,
    )


def _line(name: str, x: Sequence[float], y: Sequence[float], colors: dict[str, str], hover: str) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=list(x),
        y=list(y),
        mode="lines",
        line={"color": colors[name], "width": 2},
        hovertemplate=f"{name} {hover}<extra></extra>",
    )


def _drawn(results: Sequence[PolicyResult]) -> list[PolicyResult]:
    return [result for result in results if result.runs and result.runs[0].get("rates")]


def _legend(results: Sequence[PolicyResult], colors: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((colors[result.policy], result.policy) for result in results)


def _steps_at(samples: Sequence[float], rates: Sequence[Sequence[float]]) -> list[float]:
    """Return the steps that were taken after so many samples; between two records, batches are of one size."""
    known = [(0.0, 0.0), *((rate[1], rate[0]) for rate in rates)]
    steps: list[float] = np.interp(samples, [k[0] for k in known], [k[1] for k in known]).tolist()
    return steps

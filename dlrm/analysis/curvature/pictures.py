"""The charts of a study of curvature: density of the spectrum, curves, landscapes, and the line between two runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from dlrm.analysis.charts import BLUE, GREY, ORANGE, Chart, as_figure, lay_out
from dlrm.analysis.curvature.findings import Finding, Line
from dlrm.analysis.curvature.spectrum import density
from dlrm.analysis.curvature.trials import spread
from dlrm.analysis.study.page import format_significant

COLORS = BLUE, ORANGE
DENSITY_POINTS = 400
WIDTH = 0.01  # of the Gaussian, as a share of the spectrum's range
FAINTEST = 1e-6  # of the density's peak
MOST_DECADES = 1.0  # of losses, beyond which a landscape shows their logarithms


def draw_density(findings: Sequence[Finding]) -> Chart | None:
    """Return which eigenvalues are how frequent, on a logarithmic scale: most are near zero, few are large."""
    known = [finding for finding in findings if finding.probes]
    if not known:
        return None
    ends = torch.cat([probe.values for finding in known for probe in finding.probes])
    low, high = float(ends.min()), float(ends.max())
    width = WIDTH * max(high - low, 1e-12)
    at = torch.linspace(low - 5 * width, high + 5 * width, DENSITY_POINTS, dtype=torch.float64)
    curves = [density(finding.probes, at, width) for finding in known]
    floor = FAINTEST * max(float(curve.max()) for curve in curves)
    traces = [
        _curve(finding.label, at.tolist(), curve.clamp(min=floor).tolist(), color, "density")
        for finding, curve, color in zip(known, curves, COLORS, strict=False)
    ]
    layout = lay_out("eigenvalue")
    layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1}
    return Chart(
        name="density",
        title="Density of eigenvalues",
        description=f"Density of the Hessian's eigenvalues, from {format_significant(low)} to "
        f"{format_significant(high)}, on a logarithmic scale.",
        figure=as_figure(traces, layout),
        legend=_legend([finding.label for finding in known]),
        height=320,
    )


def draw_curves(findings: Sequence[Finding], reach: float) -> Chart | None:
    """Return the loss along one random direction through each solution."""
    known = [finding for finding in findings if any(loss is not None for loss in finding.curve)]
    if not known:
        return None
    traces = [
        _curve(finding.label, spread(len(finding.curve), reach), finding.curve, color, "loss")
        for finding, color in zip(known, COLORS, strict=False)
    ]
    spoken = "; ".join(f"{finding.label}: {_span(finding.curve)}" for finding in known)
    return Chart(
        name="curve",
        title="Loss along a random direction",
        description=f"Loss over steps along a direction as long as the weights, filter by filter. {spoken}.",
        figure=as_figure(traces, _loss_layout("step", [finding.curve for finding in known])),
        legend=_legend([finding.label for finding in known]),
        height=300,
    )


def draw_line(line: Line | None) -> Chart | None:
    """Return the loss on the straight line through both solutions, of every split."""
    if line is None:
        return None
    traces = [
        _curve(split, line.shares, losses, color, "loss")
        for (split, losses), color in zip(line.losses.items(), COLORS, strict=False)
    ]
    layout = _loss_layout("0 is run 1, 1 is run 2", list(line.losses.values()))
    layout["shapes"] = [
        {"type": "line", "x0": end, "x1": end, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": GREY, "width": 1}}
        for end in (0, 1)
    ]
    spoken = "; ".join(f"{split}: {_span(losses)}" for split, losses in line.losses.items())
    return Chart(
        name="line",
        title="Loss on the line between the two runs",
        description=f"Loss from beyond run 1 to beyond run 2. {spoken}.",
        figure=as_figure(traces, layout),
        legend=_legend(list(line.losses)),
        height=320,
    )


def draw_landscapes(findings: Sequence[Finding], reach: float) -> list[Chart]:
    """Return the loss over two random directions around each solution, all in the same colours."""
    known = [finding for finding in findings if finding.landscape]
    losses = [loss for finding in known for row in finding.landscape for loss in row if loss is not None]
    if not losses:
        return []
    is_log = max(losses) > 10**MOST_DECADES * min(losses) > 0
    return [_landscape(finding, reach, (min(losses), max(losses)), is_log=is_log) for finding in known]


def _landscape(finding: Finding, reach: float, limits: tuple[float, float], *, is_log: bool) -> Chart:
    steps = spread(len(finding.landscape), reach)
    heights = np.array(finding.landscape, dtype=np.float64)  # None becomes NaN: a hole
    shown = np.log10(heights) if is_log else heights
    low, high = (math.log10(limit) if is_log else limit for limit in limits)
    words = [[format_significant(None if math.isnan(z) else float(z)) for z in row] for row in heights]
    ticks = np.linspace(low, high, 5)
    bar = {
        "thickness": 12,
        "outlinewidth": 0,
        "tickvals": ticks.tolist(),
        "ticktext": [format_significant(float(10**tick if is_log else tick)) for tick in ticks],
        "tickfont": {"color": GREY},
    }
    contour = go.Contour(
        x=steps,
        y=steps,
        z=shown,
        text=words,
        colorscale="Viridis",
        contours={"start": low, "end": high, "size": (high - low) / 20 or 1.0},
        line={"width": 0.5, "color": "rgba(255,255,255,0.5)"},
        colorbar=bar,
        hovertemplate="loss %{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
    )
    middle = go.Scatter(
        x=[0], y=[0], mode="markers", marker={"color": "#ffffff", "size": 8, "symbol": "x"}, hoverinfo="skip"
    )
    layout = lay_out("first direction")
    layout["yaxis"] |= {"title": {"text": "second direction", "standoff": 8, "font": {"size": 12}}, "showgrid": False}
    return Chart(
        name=f"landscape-{finding.label.replace(' ', '-')}",
        title=f"Loss around {finding.label}" + (", colours by its logarithm" if is_log else ""),
        description=f"Contours of the loss over two random directions around {finding.label}, from "
        f"{format_significant(float(np.nanmin(heights)))} to {format_significant(float(np.nanmax(heights)))}; the "
        "solution is in the middle.",
        figure=as_figure([contour, middle], layout),
        height=400,
    )


def _curve(label: str, x: Sequence[float], y: Sequence[float | None], color: str, unit: str) -> go.Scatter:
    return go.Scatter(
        name=label,
        x=list(x),
        y=list(y),
        mode="lines",
        line={"color": color, "width": 2},
        hovertemplate=f"{label}: %{{y:.4~g}} {unit}<br>at %{{x:.3~g}}<extra></extra>",
    )


def _loss_layout(title: str, losses: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    known = [loss for its in losses for loss in its if loss is not None]
    layout = lay_out(title)
    if min(known) > 0 and max(known) > 10**MOST_DECADES * min(known):
        layout["yaxis"] |= {"type": "log", "exponentformat": "power", "nticks": 6}
    return layout


def _span(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    return f"{format_significant(min(known))} to {format_significant(max(known))}"


def _legend(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(COLORS, labels, strict=False)) if len(labels) > 1 else ()

"""The plan's charts: what each rank holds, how long each takes in a step, and efficiency over ranks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, lay_out
from dlrm.planning.foresee import STAGES, Foresight
from dlrm.planning.simulate import Scaling
from dlrm.planning.text import format_milliseconds
from embeddings.planning.task import format_bytes

# As in dlrm.analysis.charts, each stands out from the light and from the dark background.
COLORS = (BLUE, ORANGE, GREEN, "#a65bc4", "#c2504f", "#7a8b1e", "#1f96a8", "#b8508f", "#8c6d4f", "#5f6fd0")
REST = "#87909b"
SHOWN_TABLES = 8
FEW_RANKS = 6


def draw_holdings(names: Sequence[str], foresight: Foresight, memory_bytes: int | None) -> Chart:
    """Return a stack of tables' bytes per rank: the largest tables each in a colour, the others together."""
    sizes = foresight.bytes_by_table
    order = np.argsort(-sizes.sum(axis=1), kind="stable")
    shown = [(names[table], sizes[table]) for table in order[:SHOWN_TABLES]]
    others = order[SHOWN_TABLES:]
    if len(others):
        shown.append((f"{len(others)} more table{'s' if len(others) > 1 else ''}", sizes[others].sum(axis=0)))
    colors = [*COLORS[: min(len(order), SHOWN_TABLES)], REST]
    traces = [
        _stack(name, held, color, [format_bytes(size) for size in held])
        for (name, held), color in zip(shown, colors, strict=False)
    ]
    layout = _stacked("bytes", sizes.shape[1])
    fullest = int(foresight.bytes_by_rank.max())
    if memory_bytes is not None and memory_bytes < 3 * fullest:
        layout["shapes"] = [_level(memory_bytes)]
        layout["yaxis"]["range"] = [0, 1.05 * max(memory_bytes, fullest)]
    return Chart(
        name="holdings",
        title="Bytes per rank, by table",
        description=(
            f"Stacked bars of {sizes.shape[1]} ranks: {format_bytes(foresight.bytes_by_rank.min())} to "
            f"{format_bytes(fullest)} of tables each; the largest table is {names[order[0]]}."
        ),
        figure=as_figure(traces, layout),
        legend=tuple((color, name) for (name, _), color in zip(shown, colors, strict=False)),
        height=340,
    )


def draw_times(foresight: Foresight) -> Chart:
    """Return a stack of stages' milliseconds per rank."""
    milliseconds = foresight.by_rank * 1e3
    traces = [
        _stack(
            stage, milliseconds[:, number], color, [format_milliseconds(own) for own in foresight.by_rank[:, number]]
        )
        for number, (stage, color) in enumerate(zip(STAGES, COLORS, strict=True))
    ]
    slowest = max(foresight.stages, key=lambda stage: foresight.stages[stage])
    return Chart(
        name="times",
        title="Milliseconds of a step per rank, by stage",
        description=(
            f"Stacked bars of {len(milliseconds)} ranks; a step takes {format_milliseconds(foresight.seconds)}, "
            f"most of it {slowest}."
        ),
        figure=as_figure(traces, _stacked("ms", len(milliseconds))),
        legend=tuple(zip(COLORS, STAGES, strict=True)),
        height=340,
    )


def draw_scaling(scalings: Sequence[Scaling]) -> Chart | None:
    """Return weak and strong efficiency over the number of ranks."""
    weak = [(s.ranks, s.weak_efficiency) for s in scalings if s.weak_efficiency is not None]
    strong = [(s.ranks, s.strong_efficiency) for s in scalings if s.strong_efficiency is not None]
    if not weak:
        return None
    layout = lay_out("ranks")
    layout["xaxis"] |= {"type": "log", "tickvals": [s.ranks for s in scalings]}
    layout["yaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    traces = [
        go.Scatter(
            name=name,
            x=[ranks for ranks, _ in points],
            y=[efficiency for _, efficiency in points],
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 8},
            hovertemplate="%{x:,} ranks: %{y:.1%}<extra>" + name + "</extra>",
        )
        for name, color, points in (("weak", BLUE, weak), ("strong", ORANGE, strong))
    ]
    spoken = ", ".join(f"{ranks:,} ranks {efficiency:.0%}" for ranks, efficiency in weak)
    return Chart(
        name="scaling",
        title="Efficiency against one rank",
        description=f"Weak scaling: {spoken}.",
        figure=as_figure(traces, layout),
        legend=((BLUE, "weak: as many samples per rank"), (ORANGE, "strong: the same global batch")),
        height=280,
    )


def _stack(name: str, values: NDArray[np.generic], color: str, words: Sequence[str]) -> go.Bar:
    escaped = html.escape(name)
    return go.Bar(
        name=escaped,
        x=list(range(len(values))),
        y=values.tolist(),
        customdata=list(words),
        marker={"color": color, "line": {"width": 0}},
        hovertemplate=f"rank %{{x}}: %{{customdata}}<extra>{escaped}</extra>",
    )


def _stacked(unit: str, ranks: int) -> dict[str, Any]:
    layout = lay_out("rank") | {"barmode": "stack", "bargap": 0.12 if ranks > FEW_RANKS else 0.6}
    layout["xaxis"] |= {"nticks": 17, "tickformat": "d"}
    layout["yaxis"] |= {"title": {"text": unit, "standoff": 8, "font": {"size": 12}}}
    return layout


def _level(height: float) -> dict[str, Any]:
    line = {"color": GREY, "dash": "5px,4px", "width": 1.5}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}

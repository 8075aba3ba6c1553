"""The report's other charts: calibration, where the time went, and AUC by segment."""

from __future__ import annotations

import html
import math

import plotly.graph_objects as go

from dlrm.analysis.bottleneck import share_out_time, spread_over_ranks
from dlrm.analysis.charts import BLUE, GREY, ORANGE, Chart, as_figure, dashed_line, lay_out
from dlrm.analysis.quantities import format_count, format_duration, format_share
from dlrm.analysis.run_folder import Record, Run
from dlrm.analysis.verdict import describe_calibration
from dlrm.training.stage_times import Spread


def draw_calibration(record: Record | None) -> Chart | None:
    """Return the reliability diagram: observed over predicted share, with 95 % intervals of the observed one."""
    bins = (record or {}).get("calibration_curve") or []
    if record is None or not bins:
        return None
    margins = [wilson_margins(b["mean_label"], b["samples"]) for b in bins]
    highest = [max(b["mean_prediction"], b["mean_label"] + up) for b, (_, up) in zip(bins, margins, strict=True)]
    top = min(1.0, 1.06 * max(highest))
    axis = {"range": [0, top], "tickformat": ".0~%" if top > 0.05 else "~%", "nticks": 7}
    layout = lay_out("predicted share of positives") | {"margin": {"l": 8, "r": 12, "t": 8, "b": 8}}
    layout["xaxis"] |= axis
    layout["yaxis"] |= axis | {"title": {"text": "observed share of positives", "standoff": 8, "font": {"size": 12}}}
    return Chart(
        name="calibration",
        title="Predicted and observed share of positives",
        description=" ".join(["Reliability diagram.", *describe_calibration(record)]),
        figure=as_figure([dashed_line("predicted = observed", [0, top], [0, top]), _draw_bins(bins, margins)], layout),
        legend=((BLUE, f"{_bin_sizes(bins)} each, with the 95 % interval"), (GREY, "predicted = observed")),
        height=400,
    )


def draw_stages(run: Run) -> Chart | None:
    """Return a bar per stage of the loop, the largest on top; of several ranks the mean, with the range over them."""
    stages, of_ranks = share_out_time(run), spread_over_ranks(run)
    total = sum(seconds for _, seconds in stages)
    if not total:
        return None
    names = [html.escape(name) for name, _ in stages]
    margins = [_margins(of_ranks.get(name), total) for name, _ in stages]
    bars = go.Bar(
        orientation="h",
        y=names,
        x=[seconds / total for _, seconds in stages],
        customdata=[format_duration(seconds) for _, seconds in stages],
        marker={"color": [BLUE] + [GREY] * (len(stages) - 1)},
        hovertemplate="%{customdata}<extra></extra>",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [up for _, up in margins],
            "arrayminus": [down for down, _ in margins],
            "visible": bool(of_ranks),
            "color": ORANGE,
            "thickness": 2,
            "width": 4,
        },
    )
    ends = [seconds / total + up for (_, seconds), (_, up) in zip(stages, margins, strict=True)]
    numbers = go.Scatter(
        x=ends,
        y=names,
        text=[f" {format_share(seconds / total)}" for _, seconds in stages],
        mode="text",
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    layout = lay_out("") | {"bargap": 0.35, "margin": {"l": 8, "r": 8, "t": 4, "b": 4}}
    # Room to the right for the number behind the longest bar, also on a phone.
    layout["xaxis"] |= {"visible": False, "range": [0, 1.35 * max(ends)]}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    spoken = ", ".join(f"{name} {format_share(seconds / total)}" for name, seconds in stages)
    return Chart(
        name="stages",
        title="Share of the time" + (", from the fastest rank to the slowest" if of_ranks else ""),
        description=f"Of {format_duration(total)}: {spoken}.",
        figure=as_figure([bars, numbers], layout),
        height=34 * len(stages) + 16,
    )


def _margins(stage: Spread | None, total: float) -> tuple[float, float]:
    """Return how far a stage's share reaches below and above its mean over ranks."""
    if stage is None:
        return 0.0, 0.0
    return (stage["seconds"] - stage["least"]) / total, (stage["most"] - stage["seconds"]) / total


def draw_segments(run: Run) -> Chart | None:
    """Return the AUC within each reported segment beside the one over all rows."""
    record = run.last_measured or {}
    # One that has an AUC has both labels, and so then has the whole.
    segments = [segment for segment in record.get("segments") or [] if segment["auc"] is not None]
    if not segments:
        return None
    names = [
        f"{segment.get('name', segment['segment'])} ({format_count(segment['samples'])} rows)" for segment in segments
    ]
    dots = go.Scatter(
        name="AUC within the segment",
        x=[segment["auc"] for segment in segments],
        y=names,
        customdata=[[segment["samples"], segment["positives"]] for segment in segments],
        mode="markers",
        marker={"color": BLUE, "size": 9},
        hovertemplate="AUC %{x:.4f}<br>%{customdata[0]:,} rows, %{customdata[1]:,} positive<extra></extra>",
    )
    overall = dashed_line("AUC over all rows", [record["auc"]] * len(names), names)
    aucs = sorted(segment["auc"] for segment in segments)
    lowest, highest = min(aucs[0], record["auc"]), max(aucs[-1], record["auc"])
    margin = 0.04 * (highest - lowest) or 0.01
    layout = lay_out("AUC")
    layout["xaxis"] |= {"range": [lowest - margin, highest + margin], "nticks": 6}
    layout["yaxis"] |= {"autorange": "reversed", "categoryorder": "array", "categoryarray": names}
    return Chart(
        name="segments",
        title="AUC within each segment, the largest on top",
        description=f"AUC in {len(aucs)} segments: {aucs[0]:.4f} to {aucs[-1]:.4f}; over all rows {record['auc']:.4f}.",
        figure=as_figure([overall, dots], layout),
        legend=((BLUE, "within the segment"), (GREY, f"over all rows, {record['auc']:.4f}")),
        height=26 * len(segments) + 70,
    )


def wilson_margins(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return how far Wilson's interval (1927) of an observed share reaches below and above it."""
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, share - center + half), max(0.0, center + half - share)


def _draw_bins(bins: list[Record], margins: list[tuple[float, float]]) -> go.Scatter:
    return go.Scatter(
        name="rows of neighbouring predictions",
        x=[b["mean_prediction"] for b in bins],
        y=[b["mean_label"] for b in bins],
        customdata=[b["samples"] for b in bins],
        mode="markers",
        marker={"color": BLUE, "size": 8},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [up for _, up in margins],
            "arrayminus": [down for down, _ in margins],
            "color": BLUE,
            "thickness": 1.2,
            "width": 0,
        },
        hovertemplate="predicted %{x:.2%}<br>observed %{y:.2%}<br>%{customdata:,} rows<extra></extra>",
    )


def _bin_sizes(bins: list[Record]) -> str:
    sizes = sorted({b["samples"] for b in bins})
    size = format_count(sizes[0]) + (f" to {format_count(sizes[-1])}" if len(sizes) > 1 else "")
    return f"{len(bins)} groups of {size} rows"

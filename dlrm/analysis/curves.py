"""The report's curves over training samples: loss, metrics, learning rates and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import plotly.graph_objects as go

from dlrm.analysis import ranking
from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, dashed_line, lay_out
from dlrm.analysis.quantities import format_count, format_number
from dlrm.analysis.run_folder import Record, Run
from dlrm.training.stage_times import AVOIDABLE

MOST_POINTS = 1000
MOST_MARKERS = 40

Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line over training samples."""

    label: str
    points: Points
    color: str = BLUE
    is_reference: bool = False
    digits: int = 4
    markers: bool = False

    def trace(self) -> go.Scatter:
        """Return it as plotly draws it."""
        x, y = [x for x, _ in self.points], [y for _, y in self.points]
        if self.is_reference:
            return dashed_line(self.label, x, y)
        return go.Scatter(
            name=self.label,
            x=x,
            y=y,
            mode="lines+markers" if self.markers and len(self.points) <= MOST_MARKERS else "lines",
            line={"color": self.color, "width": 2},
            marker={"size": 6},
            cliponaxis=False,
            hovertemplate=f"%{{y:,.{self.digits}~f}} {self.label}<br>%{{x:,.0f}} samples<extra></extra>",
        )


def list_curves(run: Run) -> list[Chart]:
    """Return the charts over training samples that the run has numbers for."""
    loss = [
        Curve(label="train", points=thin(_points(run.training, "loss"))),
        Curve(label="valid", points=_points(run.validation, "logloss"), color=ORANGE, markers=True),
    ]
    calibration = _points(run.validation, "calibration")
    candidates = [
        _curve_chart(run, "loss", "Loss" if ranking.is_ranked(run.last_measured) else "Log loss", loss),
        *(_draw_ranking(run, name) for name in ranking.NAMES),
        _curve_chart(run, "auc", "AUC on the valid split", _auc_curves(run)),
        _curve_chart(
            run,
            "normalized-entropy",
            "Normalised entropy on the valid split",
            [_valid_curve(run, "normalized_entropy", "normalised entropy")],
        ),
        _curve_chart(
            run,
            "calibration-course",
            "Calibration on the valid split",
            [_valid_curve(run, "calibration", "predicted / observed"), _level("ideal", 1.0, calibration)],
        ),
        _curve_chart(run, "dense-learning-rate", "Learning rate of the dense part", [_dense_rate(run)], from_zero=True),
        _curve_chart(run, "tables-learning-rate", _tables_rate_title(run), [_tables_rate(run)], from_zero=True),
    ]
    return [chart for chart in candidates if chart is not None]


def _draw_ranking(run: Run, name: str) -> Chart | None:
    curves = [
        Curve(label=f"at {k}", points=_points(run.validation, f"{name}_{k}"), color=color, markers=True)
        for k, color in ((5, BLUE), (10, ORANGE), (20, GREEN))
    ]
    title = f"{ranking.NAMES[name]} on the valid split, {ranking.describe_kind(run)}"
    return _curve_chart(run, name, title, curves, from_zero=True)


def draw_throughput(run: Run) -> Chart | None:
    """Return samples per second between one log entry and the next."""
    course = [(0.0, 0.0)] + [(r["samples"], r["seconds"]) for r in run.training if r.get("seconds") is not None]
    speed = [(b[0], (b[0] - a[0]) / (b[1] - a[1])) for a, b in pairwise(course) if b[1] > a[1]]
    curve = Curve(label="samples per second", points=thin(speed), color=GREEN, digits=0)
    return _curve_chart(run, "throughput", "Samples per second", [curve], from_zero=True)


def draw_waits(run: Run) -> Chart | None:
    """Return which share of a step went into waiting and exchanging, between one log entry and the next."""
    known = [(record["samples"], record["stages"]) for record in run.training if record.get("stages")]
    shares = [
        (samples, sum(stages.get(name, {}).get("share") or 0.0 for name in AVOIDABLE)) for samples, stages in known
    ]
    curve = Curve(label="share of a step", points=thin(shares), color=ORANGE, digits=3)
    title = "Waiting for data and for other ranks, share of a step"
    return _curve_chart(run, "waits", title, [curve], from_zero=True, y_format=".0%")


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most `most` points, each the mean of as many neighbours, at the last one's place."""
    each = math.ceil(len(points) / most) if points else 1
    groups = [points[start : start + each] for start in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _points(records: Sequence[Record], name: str) -> Points:
    return [(record["samples"], record[name]) for record in records if record.get(name) is not None]


def _valid_curve(run: Run, name: str, label: str) -> Curve:
    return Curve(label=label, points=_points(run.validation, name), color=ORANGE, markers=True)


def _level(label: str, level: float, points: Points) -> Curve:
    """Return a dashed line as long as a curve."""
    ends = [0.0, points[-1][0]] if points else []
    return Curve(label=label, points=[(x, level) for x in ends], color=GREY, is_reference=True)


def _auc_curves(run: Run) -> list[Curve]:
    curves = [_valid_curve(run, "auc", "AUC")]
    best = (run.summary or {}).get("bayes_auc")
    if best is not None:
        curves.append(_level(f"best possible, {best:.4f}", best, curves[0].points))
    return curves


def _dense_rate(run: Run) -> Curve:
    return Curve(
        label="learning rate", points=thin(_points(run.training, "dense_learning_rate")), color=GREEN, digits=6
    )


def _tables_peak(run: Run) -> float | None:
    peak = run.config.get("tables", {}).get("learning_rate")
    return None if peak is None else float(peak)


def _tables_rate(run: Run) -> Curve:
    # Tables of the Python API have learning rates of their own each; the log knows their common factor only.
    peak, factors = _tables_peak(run), _points(run.training, "tables_learning_rate_factor")
    label = "factor" if peak is None else "learning rate"
    points = [(x, y * (1.0 if peak is None else peak)) for x, y in factors]
    return Curve(label=label, points=thin(points), color=GREEN, digits=6)


def _tables_rate_title(run: Run) -> str:
    return "Factor on the tables' learning rates" if _tables_peak(run) is None else "Learning rate of the tables"


def _curve_chart(
    run: Run, name: str, title: str, curves: list[Curve], *, from_zero: bool = False, y_format: str = ""
) -> Chart | None:
    curves = [curve for curve in curves if curve.points]
    if not any(not curve.is_reference for curve in curves):
        return None
    layout = lay_out("training samples")
    # Thousands and millions as k and M; from a thousand million on plotly's own B reads better than this format's G.
    layout["xaxis"] |= {"range": [0, run.samples], "nticks": 6, "tickformat": "~s" if run.samples < 1e9 else ""}
    layout["yaxis"] |= {"nticks": 6, "rangemode": "tozero" if from_zero else "normal", "tickformat": y_format}
    spoken = "; ".join(_speak(curve) for curve in curves)
    return Chart(
        name=name,
        title=title,
        description=f"{title} over training samples. {spoken}.",
        figure=as_figure([curve.trace() for curve in curves], layout),
        legend=tuple((curve.color, curve.label) for curve in curves) if len(curves) > 1 else (),
    )


def _speak(curve: Curve) -> str:
    (x0, first), (x1, last) = curve.points[0], curve.points[-1]
    if curve.is_reference:
        return f"{curve.label}: {format_number(first, curve.digits)}"
    if len(curve.points) == 1:
        return f"{curve.label}: {format_number(first, curve.digits)} after {format_count(x0)} samples"
    values = f"from {format_number(first, curve.digits)} to {format_number(last, curve.digits)}"
    return f"{curve.label}: {values}, between {format_count(x0)} and {format_count(x1)} samples"

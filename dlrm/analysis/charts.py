"""What every chart of the report has: a figure as plotly's JSON, words beside it, and one calm look."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# Each has a contrast of at least 3 to the light and to the dark background.
BLUE, ORANGE, GREEN, GREY = "#3b7dd8", "#c9741f", "#2a9d6f", "#7d8590"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"  # as in page/report.css


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure and its words.

    Attributes:
        name: of the element on the page.
        title: the heading.
        description: what there is to see, for those who do not see it.
        figure: as plotly's JSON.
        legend: colour and meaning of each line, where there are several; the grey one is dashed.
        height: in pixels.
    """

    name: str
    title: str
    description: str
    figure: dict[str, Any]
    legend: tuple[tuple[str, str], ...] = ()
    height: int = 240


def lay_out(x_title: str) -> dict[str, Any]:
    """Return the layout of a chart; the page's style sheet colours what is not data."""
    axis = {
        "automargin": True,
        "zeroline": False,
        "exponentformat": "B",
        "separatethousands": True,
        "ticklabelstandoff": 6,
    }
    return {
        "template": "none",
        "autosize": True,
        "font": {"family": FONT, "size": 12},
        "showlegend": False,
        "margin": {"l": 8, "r": 16, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "#2b3138",
            "bordercolor": "#59626d",
            "font": {"family": FONT, "size": 12, "color": "#ffffff"},
        },
        "xaxis": {**axis, "title": {"text": x_title, "standoff": 8, "font": {"size": 12}}, "showgrid": False},
        "yaxis": axis,
    }


def dashed_line(name: str, x: list[float], y: list[Any]) -> go.Scatter:
    """Return the line that data is compared with."""
    line = {"color": GREY, "dash": "5px,4px", "width": 1.5}
    return go.Scatter(name=name, x=x, y=y, mode="lines", line=line, hoverinfo="skip")


def as_figure(traces: list[Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Return plotly's JSON of traces and layout, after plotly has checked them."""
    content: dict[str, Any] = json.loads(go.Figure(data=traces, layout=layout).to_json())
    return content

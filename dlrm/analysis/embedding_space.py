"""The report's section on the vectors of items as a whole: whether they have collapsed, in words and in pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dlrm.analysis.charts import BLUE, GREEN, GREY, ORANGE, Chart, as_figure, dashed_line, lay_out
from dlrm.analysis.quantities import format_count, format_number, format_share
from dlrm.analysis.run_folder import EMBEDDING_SPACE, Record, Run, read_object

COLLAPSED, NARROW = 0.9, 0.5  # mean cosine
FEW_DIRECTIONS = 0.1  # effective rank over dim
_PLANE = 400  # pixels


@dataclass(frozen=True, kw_only=True)
class SpaceSection:
    """What the page says of the space of items.

    Attributes:
        words: sentences, the numbers first.
        warning: None unless the vectors have collapsed, or nearly so.
        charts: pictures, cosines and directions.
    """

    words: list[str]
    warning: str | None
    charts: list[Chart]


def describe_space(run: Run) -> SpaceSection | None:
    """Return the section, None where the run has not written `embedding_space.json`.

    Raises:
        ValueError: that file is damaged.
    """
    space = read_object(run.folder / EMBEDDING_SPACE)
    if space is None:
        return None
    try:
        return SpaceSection(
            words=_speak(space),
            warning=warn(space["mean_cosine"], space["effective_rank"], space["dim"]),
            charts=[_draw_sphere(space), _draw_about_mean(space), _draw_cosines(space), _draw_directions(space)],
        )
    except KeyError as error:
        raise ValueError(
            f"{run.folder / EMBEDDING_SPACE}: expected the description of a space, found no {error}; remove the file"
        ) from error


def warn(mean_cosine: float, effective_rank: float, dim: int) -> str | None:
    """Say how the vectors have collapsed, None if they have not."""
    if mean_cosine >= COLLAPSED:
        return (
            f"The embeddings have collapsed to one direction: the cosine of two items is {mean_cosine:.3f} on average, "
            "so that the model can hardly tell items apart."
        )
    if effective_rank < max(FEW_DIRECTIONS * dim, min(2.5, dim / 2)):
        return (
            f"The embeddings have collapsed to few directions: about {effective_rank:.1f} of {dim} are in use, so that "
            "a smaller dim would do as well, or the loss keeps items from spreading."
        )
    if mean_cosine >= NARROW:
        return (
            f"The embeddings lie in a narrow cone: the cosine of two items is {mean_cosine:.2f} on average, where 0 is "
            "that of directions spread evenly."
        )
    return None


def _speak(space: Record) -> list[str]:
    sampled = space["num_sampled"] < space["num_items"]
    who = f"{format_count(space['num_sampled'])} of " if sampled else ""
    words = [
        f"Uniformity {space['uniformity']:.2f}, mean cosine {space['mean_cosine']:.3f}, about "
        f"{space['effective_rank']:.0f} of {space['dim']} directions in use, over all pairs of "
        f"{who}{format_count(space['num_items'])} items. Uniformity is 0 where all items have one direction and "
        f"{space['best_uniformity']:.2f} where directions are spread evenly (Wang & Isola 2020). Vectors are scaled to "
        "length 1 for all of this."
    ]
    if space["alignment"] is not None:
        words.append(
            f"Two views of the same history are {space['alignment']:.3f} apart (alignment: mean squared distance of "
            f"unit vectors, 0 is alike, 2 is at a right angle), and histories have a uniformity of "
            f"{space['sequence_uniformity']:.2f}: contrast is to bring the first near 0 while the second stays low."
        )
    return words


def _draw_sphere(space: Record) -> Chart:
    turn = [2 * math.pi * i / 120 for i in range(121)]
    circle = dashed_line("the unit circle", [math.cos(a) for a in turn], [math.sin(a) for a in turn])
    circle.hoverinfo = "skip"
    layout = lay_out("first principal direction")
    axis = {"range": [-1.08, 1.08], "nticks": 5}
    layout["xaxis"] |= axis | {"constrain": "domain"}
    layout["yaxis"] |= axis | {"scaleanchor": "x", "constrain": "domain", "title": _title("second")}
    reach = sum(math.hypot(x, y) for x, y in space["on_sphere"]) / len(space["on_sphere"])
    return Chart(
        name="space-sphere",
        title="Directions of items, never scaled",
        description=(
            f"{format_count(len(space['items']))} items as unit vectors, seen along their two first principal "
            f"directions; {format_number(reach, 2)} of the way from the centre to the unit circle on average. One dot "
            "at the circle is collapse; a cloud about the centre is not."
        ),
        figure=as_figure([circle, *_dots(space, space["on_sphere"])], layout),
        legend=(*_legend(space), (GREY, "a dot here lies in this plane wholly")),
        height=_PLANE,
    )


def _draw_about_mean(space: Record) -> Chart:
    first, second = space["about_mean_shares"]
    layout = lay_out(f"first, {format_share(first)} of the variance")
    layout["xaxis"] |= {"nticks": 5}
    layout["yaxis"] |= {"nticks": 5, "title": _title(f"second, {format_share(second)}")}
    return Chart(
        name="space-mean",
        title="The same about their mean, scaled to fit",
        description=(
            "Items along the two principal directions about their mean, which hold "
            f"{format_share(first)} and {format_share(second)} of the variance."
        ),
        figure=as_figure(_dots(space, space["about_mean"]), layout),
        legend=_legend(space),
        height=_PLANE,
    )


def _draw_cosines(space: Record) -> Chart:
    width = 2 / len(space["cosines"])
    centers = [-1 + width * (i + 0.5) for i in range(len(space["cosines"]))]
    seen = go.Scatter(
        name="pairs of items",
        x=centers,
        y=space["cosines"],
        mode="lines",
        line={"color": BLUE, "width": 2, "shape": "hvh"},
        hovertemplate="density %{y:.3f}<br>at a cosine of %{x:.2f}<extra></extra>",
    )
    even = _even_density(centers, space["dim"])
    layout = lay_out("cosine of two items")
    layout["xaxis"] |= {"range": [-1, 1], "nticks": 5}
    layout["yaxis"] |= {"rangemode": "tozero", "nticks": 5}
    return Chart(
        name="space-cosines",
        title="How alike two items are",
        description=f"Density of the cosine of two items, {space['mean_cosine']:.3f} on average.",
        figure=as_figure([dashed_line("spread evenly", centers, even), seen], layout),
        legend=((BLUE, "pairs of items"), (GREY, "directions spread evenly")),
    )


def _draw_directions(space: Record) -> Chart:
    shares = space["directions"]
    places = list(range(1, len(shares) + 1))
    bars = go.Bar(x=places, y=shares, marker={"color": BLUE}, hovertemplate="direction %{x}: %{y:.1%}<extra></extra>")
    even = dashed_line("spread evenly", [0.5, len(shares) + 0.5], [1 / len(shares)] * 2)
    layout = lay_out("principal direction, the longest first")
    layout["xaxis"] |= {"range": [0.5, len(shares) + 0.5], "nticks": 6}
    layout["yaxis"] |= {"tickformat": ".0~%", "nticks": 5, "rangemode": "tozero"}
    return Chart(
        name="space-directions",
        title="Share of each direction",
        description=(
            f"The first of {len(shares)} principal directions holds {format_share(shares[0])} of the squared length, "
            f"the first half {format_share(sum(shares[: len(shares) // 2]))}."
        ),
        figure=as_figure([bars, even], layout),
        legend=((BLUE, "items"), (GREY, "directions spread evenly")),
    )


def _even_density(cosines: list[float], dim: int) -> list[float]:
    """Return the density of the cosine of two even directions, which goes with (1 - c**2) ** ((dim - 3) / 2)."""
    scale = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)
    return [scale * (1 - c * c) ** ((dim - 3) / 2) for c in cosines]


def _dots(space: Record, points: list[list[float]]) -> list[go.Scatter]:
    """Return the points, a trace for each group; the most popular ones, of which there are few, are drawn last."""
    groups = space["groups"]
    if groups is None:
        return [_trace("items", BLUE, space, points, range(len(points)))]
    traces = []
    for group in reversed(range(len(space["group_names"]))):
        members = [i for i in range(len(points)) if groups[i] == group]
        if members:
            traces.append(_trace(space["group_names"][group], _color(group), space, points, members))
    return traces


def _trace(name: str, color: str, space: Record, points: list[list[float]], members: Any) -> go.Scatter:
    counts = space["counts"]
    told = [f"item {space['items'][i]}" + (f", {format_count(counts[i])} actions" if counts else "") for i in members]
    return go.Scatter(
        name=name,
        x=[points[i][0] for i in members],
        y=[points[i][1] for i in members],
        text=told,
        mode="markers",
        marker={"color": color, "size": 4, "opacity": 0.7},
        hovertemplate="%{text}<extra></extra>",
    )


def _legend(space: Record) -> tuple[tuple[str, str], ...]:
    if space["groups"] is None:
        return ((BLUE, "items"),)
    return tuple((_color(group), name) for group, name in enumerate(space["group_names"]))


def _color(group: int) -> str:
    return (ORANGE, GREEN, BLUE)[group % 3]


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 8, "font": {"size": 12}}

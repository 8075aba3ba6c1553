"""What the vectors of items look like as a whole, and whether they have collapsed; `recforge report` shows it.

A picture alone would lie: scaled to fit, a collapsed cloud looks like any other. So the numbers of Wang & Isola (2020),
"Understanding contrastive representation learning through alignment and uniformity on the hypersphere", stand beside
it, and one of both pictures is never scaled.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dlrm.analysis.run_folder import EMBEDDING_SPACE
from dlrm.diverged import DivergedError

MOST_ITEMS = 4096  # all pairs of so many are compared
MOST_POINTS = 1500
COSINE_BINS = 80
_PER_BLOCK = 512
GROUPS = ("the most popular tenth", "the next four tenths", "the less popular half")


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpace:
    """Vectors of items as points on the unit sphere; of a large catalogue a sample drawn without looking.

    Attributes:
        num_items: of the catalogue.
        num_sampled: items whose pairs were compared.
        dim: of the vectors.
        uniformity: see `measure_uniformity`.
        best_uniformity: of directions that are spread evenly in as many dimensions.
        mean_cosine: between two different items.
        effective_rank: how many directions are in use: exp of the entropy of the singular values, divided by their sum
            (Roy & Vetterli 2007); 1 to `dim`.
        directions: [dim] share of the squared length in each principal direction about zero, descending.
        cosines: [COSINE_BINS] density of the cosine of two items over equal bins of [-1, 1].
        alignment: see `measure_alignment`; None where no views were given.
        sequence_uniformity: uniformity of those views; None likewise.
        items: [points] ids of the items drawn.
        counts: [points] their training actions; None where not known.
        groups: [points] by popularity, a place in `GROUPS`; None likewise.
        on_sphere: [points] x and y: unit vectors along the two first principal directions about zero, unscaled; a
            point at the rim of the unit circle lies in that plane wholly.
        about_mean: [points] x and y along the two first principal directions about the mean.
        about_mean_shares: of the variance, in these two.
    """

    num_items: int
    num_sampled: int
    dim: int
    uniformity: float
    best_uniformity: float
    mean_cosine: float
    effective_rank: float
    directions: list[float]
    cosines: list[float]
    alignment: float | None
    sequence_uniformity: float | None
    items: list[int]
    counts: list[int] | None
    groups: list[int] | None
    on_sphere: list[tuple[float, float]]
    about_mean: list[tuple[float, float]]
    about_mean_shares: tuple[float, float]


@torch.no_grad()
def measure_uniformity(vectors: Tensor) -> float:
    """Return log of the mean of exp(-2 |x - y|**2) over pairs of unit vectors (Wang & Isola 2020, t = 2).

    It is 0 where all vectors have one direction, and the lower the more evenly they spread.

    Args:
        vectors: [n, dim], of any length; n > 1.
    """
    return _compare_pairs(_to_sphere(vectors)).uniformity


@torch.no_grad()
def measure_alignment(one: Tensor, other: Tensor) -> float:
    """Return the mean of |x - y|**2 over pairs of unit vectors that should be alike (Wang & Isola 2020, alpha = 2).

    Args:
        one: [n, dim], of any length.
        other: [n, dim], row by row another view of the same.

    Raises:
        ValueError: other shapes.
        DivergedError: a vector is not finite.
    """
    if one.shape != other.shape:
        raise ValueError(f"expected two views of one shape, got {list(one.shape)} and {list(other.shape)}")
    return float((_to_sphere(one) - _to_sphere(other)).square().sum(1).mean())


@torch.no_grad()
def describe_space(
    items: Tensor, item_counts: Tensor | None = None, views: tuple[Tensor, Tensor] | None = None
) -> EmbeddingSpace:
    """Measure and draw the space of items.

    Args:
        items: [n, dim], by id; row 0 is PAD and left out; dim > 1, n > 2.
        item_counts: [n] training actions of each, by which points are coloured.
        views: two encodings [b, dim] of the same b > 1 histories, such as of their augmented views.

    Raises:
        ValueError: other shapes.
        DivergedError: a vector is not finite.
    """
    if items.ndim != 2 or len(items) < 3 or items.shape[1] < 2:
        raise ValueError(f"expected items [n, dim], n > 2 and dim > 1, got shape {list(items.shape)}")
    if item_counts is not None and item_counts.shape != items.shape[:1]:
        raise ValueError(f"item_counts: expected shape [{len(items)}], got {list(item_counts.shape)}")
    # A generator of its own, so that a picture changes nothing of the run's random numbers.
    drawn = 1 + torch.randperm(len(items) - 1, generator=torch.Generator().manual_seed(0))[:MOST_ITEMS]
    sphere = _to_sphere(items[drawn.to(items.device)])
    pairs, squares, axes = _compare_pairs(sphere), *_find_directions(sphere)
    shown = drawn[:MOST_POINTS]
    centered = sphere - sphere.mean(0)
    variances, mean_axes = _find_directions(centered)
    points = centered[:MOST_POINTS] @ mean_axes[:, :2]
    return EmbeddingSpace(
        num_items=len(items) - 1,
        num_sampled=len(drawn),
        dim=items.shape[1],
        uniformity=pairs.uniformity,
        best_uniformity=find_best_uniformity(items.shape[1]),
        mean_cosine=pairs.mean_cosine,
        effective_rank=_find_effective_rank(squares),
        directions=_shares(squares).tolist(),
        cosines=pairs.density,
        alignment=None if views is None else measure_alignment(*views),
        sequence_uniformity=None if views is None else measure_uniformity(torch.cat(views)),
        items=shown.tolist(),
        counts=None if item_counts is None else item_counts.cpu()[shown].long().tolist(),
        groups=None if item_counts is None else _group(item_counts.cpu())[shown].tolist(),
        on_sphere=_as_points(sphere[:MOST_POINTS] @ axes[:, :2]),
        about_mean=_as_points(points),
        about_mean_shares=(float(_shares(variances)[0]), float(_shares(variances)[1])),
    )


def write_space(space: EmbeddingSpace, folder: Path) -> None:
    """Write it into a run's folder, whole or not at all, where `recforge report` finds it."""
    path = folder / EMBEDDING_SPACE
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps({**asdict(space), "group_names": GROUPS}, allow_nan=False), encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def find_best_uniformity(dim: int) -> float:
    """Return the uniformity of directions drawn evenly from the sphere in `dim` dimensions.

    It is log E[exp(4 c - 4)] for the cosine c of two such directions, whose even moments are products of
    (2 j + 1) / (dim + 2 j), j = 0, 1, ...; the odd ones are 0.
    """
    total, term = 0.0, 1.0
    for j in range(40):
        total += term
        term *= 16.0 / ((2 * j + 1) * (2 * j + 2)) * (2 * j + 1) / (dim + 2 * j)
    return math.log(total) - 4.0


@dataclass(frozen=True)
class _Pairs:
    uniformity: float
    mean_cosine: float
    density: list[float]  # [COSINE_BINS]


def _compare_pairs(sphere: Tensor) -> _Pairs:
    """Look at all pairs of different rows, block by block."""
    if len(sphere) < 2:
        raise ValueError(f"expected at least two vectors, got {len(sphere)}")
    potential, cosine, counts = 0.0, 0.0, torch.zeros(COSINE_BINS, dtype=torch.float64)
    for first in range(0, len(sphere) - 1, _PER_BLOCK):
        block = sphere[first : first + _PER_BLOCK]
        products = block @ sphere[first:].T
        above = torch.ones_like(products, dtype=torch.bool).triu_(1)
        cosines = products[above].clamp_(-1, 1)
        cosine += float(cosines.sum())
        counts += torch.histc(cosines.float().cpu(), COSINE_BINS, -1, 1).double()
        potential += float(cosines.sub_(1).mul_(4).exp_().sum())
    pairs = len(sphere) * (len(sphere) - 1) / 2
    density = (counts / pairs * (COSINE_BINS / 2)).tolist()
    return _Pairs(math.log(potential / pairs), cosine / pairs, density)


def _to_sphere(vectors: Tensor) -> Tensor:
    """Return unit vectors in float64; zero vectors, which are alike, all get the first axis for a direction."""
    wrong = torch.nonzero(~torch.isfinite(vectors).all(1))
    if len(wrong):
        raise DivergedError(
            f"vectors: expected finite numbers, got others in row {int(wrong[0])} and {len(wrong) - 1} more "
            "(the model has diverged: lower --dense.learning-rate)"
        )
    sphere = F.normalize(vectors.detach().double(), dim=1)
    sphere[:, 0] += (sphere == 0).all(1)
    return sphere


def _find_directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return [dim] squared singular values, descending, and [dim, dim] the directions as columns.

    Of two opposite directions the one whose largest number is positive, so that pictures of one run look alike.
    """
    squares, axes = torch.linalg.eigh(vectors.T @ vectors)
    squares, axes = squares.flip(0).clamp_min(0), axes.flip(1)
    return squares, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def _shares(squares: Tensor) -> Tensor:
    return squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _find_effective_rank(squares: Tensor) -> float:
    shares = _shares(squares.sqrt())
    return float(torch.special.entr(shares).sum().exp())


def _group(counts: Tensor) -> Tensor:
    """Return [n] the group of each item by popularity; of items as popular as one another any may come first."""
    places = torch.empty(len(counts), dtype=torch.int64)
    places[1 + counts[1:].argsort(descending=True, stable=True)] = torch.arange(len(counts) - 1)
    places[0] = len(counts)
    return torch.bucketize(places, torch.tensor([0.1, 0.5]) * (len(counts) - 1), right=True)


def _as_points(points: Tensor) -> list[tuple[float, float]]:
    return [(round(x, 4), round(y, 4)) for x, y in points.tolist()]

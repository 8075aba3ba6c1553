"""`recforge recommend` and `recforge nearest`: ask a trained recommender of sequences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dlrm.cli import parse

if TYPE_CHECKING:
    from contrastive.recommender import Scored


@dataclass(frozen=True, kw_only=True)
class RecommendArguments:
    """Say which items come next for users, by what they did."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one checkpoint of it."""
    user: tuple[str, ...]
    """Users by name, one or several."""
    count: int = 10
    """Items for each."""
    keep_seen: bool = False
    """Also recommend what a user has acted on."""
    keep_unseen: bool = False
    """Also recommend items that training never saw, whose rows are what they were at first."""
    data: Path | None = None
    """The prepared sequences, where they are not where the run found them."""
    json: bool = False
    """Print one JSON object for each user."""


@dataclass(frozen=True, kw_only=True)
class NearestArguments:
    """Say which items are like others."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or one checkpoint of it."""
    item: tuple[str, ...]
    """Items by name, one or several."""
    count: int = 10
    """Items for each."""
    by: Literal["cosine", "dot"] = "cosine"
    """The angle between vectors, or their inner product, which favours popular items."""
    keep_unseen: bool = False
    """Also items that training never saw, whose rows are what they were at first."""
    data: Path | None = None
    """The prepared sequences, where they are not where the run found them."""
    json: bool = False
    """Print one JSON object for each item."""


def run_recommend(argv: list[str]) -> int:
    """Print what a run recommends."""
    arguments = parse(RecommendArguments, argv, program="recforge recommend")
    from contrastive.recommender import Recommender

    recommender = Recommender(arguments.run, arguments.data)
    found = recommender.recommend(
        arguments.user, arguments.count, keep_seen=arguments.keep_seen, keep_unseen=arguments.keep_unseen
    )
    _print("user", arguments.user, found, as_json=arguments.json)
    return 0


def run_nearest(argv: list[str]) -> int:
    """Print what is like an item."""
    arguments = parse(NearestArguments, argv, program="recforge nearest")
    from contrastive.recommender import Recommender

    recommender = Recommender(arguments.run, arguments.data)
    found = recommender.nearest(arguments.item, arguments.count, arguments.by, keep_unseen=arguments.keep_unseen)
    _print("item", arguments.item, found, as_json=arguments.json)
    return 0


def _print(kind: str, names: tuple[str, ...], found: list[Scored], *, as_json: bool) -> None:
    for name, items in zip(names, found, strict=True):
        if as_json:
            print(json.dumps({kind: name, "items": [{"item": item, "score": score} for item, score in items]}))
        else:
            print(f"{kind} {name}")
            for place, (item, score) in enumerate(items, 1):
                print(f"{place:4}  {score:10.4f}  {item}")

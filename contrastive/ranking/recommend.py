"""What a trained model recommends: the items of highest score for a user, and the items nearest to an item."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive.data.sequences import PAD
from contrastive.ranking.ranks import Seen, rank_items


class TopItems(NamedTuple):
    """Items of highest score, best first, of equal scores the lower item first.

    Attributes:
        items: [b, count] int64; PAD where fewer are left.
        scores: [b, count] float64; minus infinity where fewer are left.
    """

    items: Tensor
    scores: Tensor


def recommend_items(
    vectors: Tensor, items: Tensor, count: int, seen: Seen | None = None, *, among: Tensor | None = None
) -> TopItems:
    """Return the items of highest score for each user.

    Args:
        vectors: [b, dim] of the users' histories.
        items: [n, dim], by id, PAD first.
        count: how many are wanted.
        seen: of each user, not to be recommended again; None recommends those too.
        among: [m] int64 ids of which to recommend, ascending, without PAD; None is all.

    Raises:
        ValueError: as `rank_items`; or count is less than 1.
        DivergedError: as `rank_items`.
    """
    if count < 1:
        raise ValueError(f"expected at least one item to recommend, got {count} (--count)")
    if among is not None:
        kept = F.pad(among, (1, 0), value=PAD)
        places = torch.full((len(items),), PAD).index_put((kept,), torch.arange(len(kept)))
        placed = None if seen is None else Seen(seen.offsets, places[seen.items])
        found = recommend_items(vectors, items[kept.to(items.device)], count, placed)
        return TopItems(kept[found.items], found.scores)
    top = min(count, len(items) - 1)
    ranking = rank_items(vectors, items, top=top, seen=seen)
    return TopItems(
        F.pad(ranking.items, (0, count - top), value=PAD), F.pad(ranking.scores, (0, count - top), value=-torch.inf)
    )


def find_nearest(
    items: Tensor,
    ids: Tensor,
    count: int,
    by: Literal["cosine", "dot"] = "cosine",
    *,
    among: Tensor | None = None,
) -> TopItems:
    """Return the items nearest to each of some items, without itself.

    Args:
        items: [n, dim], by id, PAD first.
        ids: [b] int64 in [1, n).
        count: how many are wanted.
        by: the cosine of the angle between both vectors, where a zero vector is at 0 to all, or their inner product,
            which favours popular items, as their vectors are long.
        among: see `recommend_items`.

    Raises:
        ValueError: an id lies outside the catalogue, or as `recommend_items`.
        DivergedError: as `rank_items`.
    """
    outside = torch.nonzero((ids < 1) | (ids >= len(items))).flatten()
    if len(outside):
        raise ValueError(f"expected an item in [1, {len(items)}), got {int(ids[outside[0]])} (--item)")
    vectors = items.detach().float()
    if by == "cosine":
        vectors = F.normalize(vectors.double(), dim=1).float()
    each_itself = Seen(torch.arange(len(ids) + 1), ids)
    return recommend_items(vectors[ids.to(vectors.device)], vectors, count, each_itself, among=among)

"""How well targets rank among the whole catalogue, collected batch by batch: the same however users are split up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastive.ranking.ranks import Seen, rank_items
from dlrm.distributed.ranks import Ranks

CUTOFFS = (5, 10, 20, 50)
FILTERED, UNFILTERED, TRAINED_TARGETS = "filtered", "unfiltered", "-trained-targets"


@dataclass(frozen=True, kw_only=True)
class RankingValues:
    """Metrics of one evaluation, each a mean over users; what depends on a cutoff is given by cutoff.

    A user has one target, so recall is the hit rate.
    """

    filtered: bool
    """Whether items that a user has seen were left out; numbers of both kinds cannot be compared."""
    users: int
    """One target each."""
    ties: float
    """Other items that score exactly what the target does; all of them were counted against it."""
    recall: dict[int, float]
    """Share of users whose target is among the first items; the hit rate."""
    ndcg: dict[int, float]
    """1 / log2(1 + rank) within the cutoff, else 0 (Järvelin & Kekäläinen 2002)."""
    mrr: dict[int, float]
    """1 / rank within the cutoff, else 0."""
    precision: dict[int, float]
    """Recall over the cutoff."""
    coverage: dict[int, float]
    """Share of the catalogue that is among anybody's first items."""
    target_popularity: float | None
    """Mean log(1 + training actions) of the targets; None where the actions are not known."""
    recommended_popularity: dict[int, float] | None
    """The same of the items recommended."""
    trained_targets: bool = False
    """Whether only users were measured whose target occurs in training; these numbers compare only alike, too."""

    @property
    def popularity_bias(self) -> dict[int, float] | None:
        """How much more popular recommended items are than targets, as the difference of the mean logs."""
        if self.recommended_popularity is None or self.target_popularity is None:
            return None
        return {k: value - self.target_popularity for k, value in self.recommended_popularity.items()}

    def named(self) -> dict[str, float]:
        """Return all values by name, for logs and tables: "unfiltered/recall@10" and so on.

        Where only trained targets were measured, it is "unfiltered-trained-targets/recall@10".
        """
        groups = {
            "recall": self.recall,
            "ndcg": self.ndcg,
            "mrr": self.mrr,
            "precision": self.precision,
            "coverage": self.coverage,
            "popularity_bias": self.popularity_bias or {},
        }
        kind = (FILTERED if self.filtered else UNFILTERED) + (TRAINED_TARGETS if self.trained_targets else "")
        by_cutoff = {f"{kind}/{name}@{k}": value for name, group in groups.items() for k, value in group.items()}
        return by_cutoff | {f"{kind}/ties": self.ties}


class RankingMetrics:
    """Collects where targets rank among all items, in integers: sums are exact.

    Its memory is 8 bytes per item and cutoff, beside the blocks of scores of one update.

    Args:
        num_items: items of the catalogue, without PAD.
        cutoffs: ascending.
        filtered: whether items that a user has seen are left out of the ranking.
        item_counts: [num_items + 1] training actions of each item, for the popularity bias.
        trained_targets: whether only users are added whose target occurs in training, for the values' names.

    Raises:
        ValueError: cutoffs are not ascending from 1, or there are counts of another number of items.
    """

    def __init__(
        self,
        num_items: int,
        cutoffs: Sequence[int] = CUTOFFS,
        *,
        filtered: bool = False,
        item_counts: Tensor | None = None,
        trained_targets: bool = False,
    ) -> None:
        if not cutoffs or list(cutoffs) != sorted(set(cutoffs)) or cutoffs[0] < 1:
            raise ValueError(f"expected ascending cutoffs from 1, got {list(cutoffs)}")
        if item_counts is not None and item_counts.shape != (num_items + 1,):
            raise ValueError(f"item_counts: expected shape [{num_items + 1}], got {list(item_counts.shape)}")
        self.num_items, self.cutoffs, self.filtered = num_items, tuple(cutoffs), filtered
        self.trained_targets = trained_targets
        self._popularity = None if item_counts is None else torch.log1p(item_counts.detach().double().cpu())
        # Of each rank up to the last cutoff; number 0 counts those beyond it, the last one the ties.
        self._ranks = torch.zeros(self.cutoffs[-1] + 2, dtype=torch.int64)
        # Of each item: how often it was recommended between a cutoff and the one before, and how often the target.
        self._recommended = torch.zeros(len(self.cutoffs) + 1, num_items + 1, dtype=torch.int64)

    def __len__(self) -> int:
        return int(self._ranks[:-1].sum())

    def update(self, vectors: Tensor, items: Tensor, targets: Tensor, seen: Seen | None = None) -> None:
        """Add users.

        Args:
            vectors: [b, dim] of the users' histories.
            items: [num_items + 1, dim], by id, PAD first.
            targets: [b] int64, the item that came next for each.
            seen: of each user; needed where seen items are filtered, and unused elsewhere.

        Raises:
            ValueError: as `rank_items`; or `seen` is needed and missing. Nothing of the users is kept.
            DivergedError: as `rank_items`.
        """
        if len(items) != self.num_items + 1:
            raise ValueError(f"expected {self.num_items + 1} items, PAD among them, got {len(items)}")
        if self.filtered and seen is None:
            raise ValueError("expected what users have seen, since it is to be filtered, got none")
        top = min(self.cutoffs[-1], self.num_items)
        seen = seen if self.filtered else None
        ranking = rank_items(vectors, items, targets=targets, top=top, seen=seen)
        last = self.cutoffs[-1]
        within = torch.where(ranking.ranks <= last, ranking.ranks, 0)
        self._ranks[: last + 1] += torch.bincount(within, minlength=last + 1)
        self._ranks[-1] += ranking.ties.sum()
        for i, (first, stop) in enumerate(zip((0, *self.cutoffs), self.cutoffs, strict=False)):
            _count(self._recommended[i], ranking.items[:, first:stop])
        _count(self._recommended[-1], targets)

    def sum_over(self, ranks: Ranks) -> None:
        """Let each rank's collector hold the users of all ranks (a collective call, to be made once)."""
        self._ranks = ranks.sum_tensor(self._ranks)
        self._recommended = ranks.sum_tensor(self._recommended)

    def compute(self) -> RankingValues:
        """Return the metrics of all users so far; more may be added afterwards.

        Raises:
            ValueError: there are no users.
        """
        users = len(self)
        if not users:
            raise ValueError("expected at least one user to evaluate, got none")
        counts: list[int] = self._ranks.tolist()
        hits = {k: sum(counts[1 : k + 1]) for k in self.cutoffs}
        recommended = self._recommended[:-1].cumsum(0)
        recommended[:, 0] = 0  # where a list has come to its end
        popularity, target_popularity = None, None
        if self._popularity is not None:
            popularity = {k: self._mean_popularity(recommended[i]) for i, k in enumerate(self.cutoffs)}
            target_popularity = self._mean_popularity(self._recommended[-1])
        return RankingValues(
            filtered=self.filtered,
            users=users,
            ties=counts[-1] / users,
            recall={k: hits[k] / users for k in self.cutoffs},
            ndcg={k: math.fsum(counts[r] / math.log2(1 + r) for r in range(1, k + 1)) / users for k in self.cutoffs},
            mrr={k: math.fsum(counts[r] / r for r in range(1, k + 1)) / users for k in self.cutoffs},
            precision={k: hits[k] / users / k for k in self.cutoffs},
            coverage={k: int((recommended[i] > 0).sum()) / self.num_items for i, k in enumerate(self.cutoffs)},
            target_popularity=target_popularity,
            recommended_popularity=popularity,
            trained_targets=self.trained_targets,
        )

    def _mean_popularity(self, counts: Tensor) -> float:
        assert self._popularity is not None
        total = int(counts.sum())  # of nothing recommended: NaN
        return float((counts * self._popularity).sum()) / total if total else math.nan


def _count(counts: Tensor, items: Tensor) -> None:
    flat = items.detach().reshape(-1).long().cpu()
    counts.index_add_(0, flat, torch.ones_like(flat))

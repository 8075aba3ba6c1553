"""Metrics are those of the definitions and of torchmetrics, say if seen items were filtered, and add up exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contrastive.ranking.ranking_metrics import RankingMetrics, RankingValues
from contrastive.ranking.ranks import Seen
from dlrm.distributed.ranks import Ranks

NUM_ITEMS, USERS, CUTOFFS = 90, 60, (1, 5, 20)
COUNTS = torch.arange(NUM_ITEMS + 1) ** 2


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, Tensor, Tensor, Seen]:
    """Vectors of users and items, targets that are often well ranked, and seven seen items each."""
    generator = torch.Generator().manual_seed(11)
    items = torch.randn(NUM_ITEMS + 1, 6, generator=generator)
    targets = torch.randint(1, NUM_ITEMS + 1, (USERS,), generator=generator)
    vectors = items[targets] + torch.randn(USERS, 6, generator=generator)
    seen = torch.randint(1, NUM_ITEMS + 1, (7 * USERS,), generator=generator)
    return vectors, items, targets, Seen(7 * torch.arange(USERS + 1), seen)


def measure(world: tuple[Tensor, Tensor, Tensor, Seen], *, filtered: bool) -> RankingValues:
    metrics = RankingMetrics(NUM_ITEMS, CUTOFFS, filtered=filtered, item_counts=COUNTS)
    metrics.update(*world)
    return metrics.compute()


@pytest.mark.parametrize("filtered", [False, True])
def test_against_the_definitions(world: Any, rank_by_sorting: Any, filtered: bool) -> None:
    vectors, items, targets, seen = world
    values = measure(world, filtered=filtered)
    every, lists = [], []
    for user in range(USERS):
        hidden = seen.items[7 * user : 7 * user + 7].tolist() if filtered else ()
        rank, _, order = rank_by_sorting(vectors[user].numpy(), items.numpy(), int(targets[user]), hidden)
        every.append(rank)
        lists.append(order)
    place = np.array(every)
    log_counts = np.log1p(COUNTS.numpy())
    for k in CUTOFFS:
        hit = place <= k
        assert 0.1 < hit.mean() < 1
        assert values.recall[k] == pytest.approx(hit.mean())
        assert values.precision[k] == pytest.approx(hit.mean() / k)
        assert values.mrr[k] == pytest.approx(np.mean(hit / place))
        assert values.ndcg[k] == pytest.approx(np.mean(hit / np.log2(1 + place)))
        first = np.array([order[:k] for order in lists])
        assert values.coverage[k] == pytest.approx(len(np.unique(first)) / NUM_ITEMS)
        bias = log_counts[first].mean() - log_counts[targets.numpy()].mean()
        assert values.popularity_bias is not None
        assert values.popularity_bias[k] == pytest.approx(bias)
    assert (values.users, values.ties) == (USERS, 0.0)


@pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The distutils package is deprecated:DeprecationWarning")  # torchmetrics imports it
def test_against_torchmetrics(world: Any) -> None:
    from torchmetrics.functional import retrieval

    vectors, items, targets, _ = world
    values = measure(world, filtered=False)
    scores = vectors @ items[1:].T
    for k in CUTOFFS:
        sums = np.zeros(4)
        for user in range(USERS):
            relevant = torch.zeros(NUM_ITEMS, dtype=torch.long)
            relevant[targets[user] - 1] = 1
            sums += [
                float(retrieval.retrieval_recall(scores[user], relevant, k)),
                float(retrieval.retrieval_precision(scores[user], relevant, k)),
                float(retrieval.retrieval_normalized_dcg(scores[user], relevant, k)),
                float(retrieval.retrieval_reciprocal_rank(scores[user], relevant)),
            ]
        expected = (sums / USERS).tolist()
        assert [values.recall[k], values.precision[k], values.ndcg[k]] == pytest.approx(expected[:3], rel=1e-5)
    # Its reciprocal rank knows no cutoff, and so none is given to ours.
    whole = RankingMetrics(NUM_ITEMS, (NUM_ITEMS,))
    whole.update(*world)
    assert whole.compute().mrr[NUM_ITEMS] == pytest.approx(expected[3], rel=1e-5)


def test_names_say_what_was_filtered(world: Any) -> None:
    plain, filtered = (measure(world, filtered=flag).named() for flag in (False, True))
    assert len(plain) == 6 * len(CUTOFFS) + 1
    assert all(name.startswith("unfiltered/") for name in plain)
    assert {name.replace("unfiltered", "filtered") for name in plain} == set(filtered)
    # Targets were seen by nobody else's doing, so that filtering can only help.
    assert filtered["filtered/recall@5"] >= plain["unfiltered/recall@5"]
    with pytest.raises(ValueError, match="expected what users have seen"):
        RankingMetrics(NUM_ITEMS, filtered=True).update(*world[:3])


def test_ties_are_told_apart() -> None:
    metrics = RankingMetrics(4, (1, 2))
    items = torch.tensor([[0.0], [1.0], [1.0], [1.0], [2.0]])
    metrics.update(torch.ones(3, 1), items, torch.tensor([4, 1, 2]))
    values = metrics.compute()
    assert values.ties == 4 / 3
    assert values.recall == {1: 1 / 3, 2: 1 / 3}
    assert values.popularity_bias is None
    assert "unfiltered/popularity_bias@1" not in values.named()


def test_a_collapsed_model_gets_nothing() -> None:
    metrics = RankingMetrics(500, (5, 50))
    metrics.update(torch.ones(64, 8), torch.ones(501, 8), torch.arange(1, 65))
    values = metrics.compute()
    assert values.recall == {5: 0.0, 50: 0.0}
    assert values.coverage == {5: 5 / 500, 50: 50 / 500}
    assert values.ties == 499


@pytest.mark.parametrize("filtered", [False, True])
def test_metrics_are_the_same_however_users_are_split_up(world: Any, filtered: bool) -> None:
    vectors, items, targets, seen = world
    parts = RankingMetrics(NUM_ITEMS, CUTOFFS, filtered=filtered, item_counts=COUNTS)
    for first, last in ((40, USERS), (0, 1), (40, 40), (1, 40)):
        own = Seen(seen.offsets[first : last + 1], seen.items)
        parts.update(vectors[first:last], items, targets[first:last], own)
    assert parts.compute() == measure(world, filtered=filtered)  # to the last bit


class _TwoRanks(Ranks):
    """Stands for a rank whose neighbour has seen the very same users."""

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


def test_ranks_of_a_job_add_up(world: Any) -> None:
    metrics = RankingMetrics(NUM_ITEMS, CUTOFFS, item_counts=COUNTS)
    metrics.update(*world)
    alone = metrics.compute()
    metrics.sum_over(_TwoRanks(count=2))
    both = metrics.compute()
    assert both.users == 2 * USERS
    assert both.recall == alone.recall
    assert both.coverage == alone.coverage


def test_lists_longer_than_the_catalogue() -> None:
    metrics = RankingMetrics(3, (2, 10), item_counts=torch.tensor([0, 1, 2, 3]))
    metrics.update(torch.ones(1, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([1]))
    values = metrics.compute()
    assert values.recall == {2: 0.0, 10: 1.0}
    assert values.coverage == {2: 2 / 3, 10: 1.0}
    assert values.recommended_popularity is not None
    assert values.recommended_popularity[10] == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)


def test_mistakes_are_named(world: Any) -> None:
    with pytest.raises(ValueError, match="at least one user"):
        RankingMetrics(5).compute()
    with pytest.raises(ValueError, match=r"ascending cutoffs from 1, got \[5, 5\]"):
        RankingMetrics(5, (5, 5))
    with pytest.raises(ValueError, match=r"item_counts: expected shape \[6\], got \[5\]"):
        RankingMetrics(5, item_counts=torch.ones(5))
    metrics = RankingMetrics(NUM_ITEMS + 1)
    with pytest.raises(ValueError, match="expected 92 items, PAD among them, got 91"):
        metrics.update(*world)
    assert len(metrics) == 0

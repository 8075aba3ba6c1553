"""Tells a model that has learned nothing, or forgotten it, from one that ranks: of 0 and of little nobody is warned."""

from __future__ import annotations

import math

from contrastive.ranking.ranking_metrics import RankingValues
from dlrm.config import GuardConfig

STANDARD_ERRORS = 2.0  # few users, and few epochs, are soon within three of chance and learn nevertheless
CURE = (
    "lower --dense.learning-rate or --tables.learning-rate, or lengthen their warm-up "
    "(--dense-schedule.warmup-samples, --tables-schedule.warmup-samples)"
)


def is_at_chance(values: RankingValues, num_items: int) -> bool:
    """Whether everybody is told the same items, or targets are found no more often than at random."""
    return _same_items(values, num_items) is not None or _is_random(values, num_items)


def complain(
    values: RankingValues, num_items: int, evaluations_at_chance: int, guards: GuardConfig, *, last: bool = False
) -> str | None:
    """Say what is wrong with an evaluation, or nothing.

    Args:
        values: of the evaluation.
        num_items: of the catalogue.
        evaluations_at_chance: in a row, with this one.
        guards: which checks are on.
        last: whether two are enough if all are told the same; who guesses may only have begun to learn.
    """
    if guards.constant_prediction and 2 * values.ties > num_items:
        return (
            f"{values.ties:,.0f} of {num_items:,} items score what the right one does, as the mean over "
            f"{values.users:,} users; the model cannot tell items apart: {CURE}, or raise --tables.init-scale"
        )
    limit, cutoff = guards.chance_evaluations, _same_items(values, num_items)
    enough = min(2, limit) if last and cutoff is not None else limit
    if not limit or evaluations_at_chance < enough:
        return None
    if cutoff is not None:
        found = f"all of {values.users:,} users are told the same {cutoff} items"
    else:
        recall = ", ".join(f"@{k} {values.recall[k]:.4f} ({k / num_items:.4f})" for k in values.recall if k < num_items)
        found = (
            f"on {values.users:,} users, recall is no better than that of items drawn at random, which stands behind "
            f"it: {recall}"
        )
    return f"{found}, in {evaluations_at_chance} evaluations in a row; {CURE}; --guards.chance-evaluations 0 goes on"


def _same_items(values: RankingValues, num_items: int) -> int | None:
    """Return how many first items are the same for everybody, if as many as that cannot be by chance."""
    if values.filtered:  # without what they have seen, lists differ
        return None
    for cutoff, coverage in values.coverage.items():
        if 10 <= cutoff < min(num_items, values.users) and round(coverage * num_items) == cutoff:
            return cutoff
    return None


def _is_random(values: RankingValues, num_items: int) -> bool:
    chances = [(cutoff / num_items, recall) for cutoff, recall in values.recall.items() if cutoff < num_items]
    return bool(chances) and all(
        # The standard error is that of a mean of draws that hit or miss.
        recall - chance < STANDARD_ERRORS * math.sqrt(chance * (1 - chance) / values.users)
        for chance, recall in chances
    )

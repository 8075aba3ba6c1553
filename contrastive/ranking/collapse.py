"""Tells a model that has learned nothing, or forgotten it, from one that ranks: of 0 and of little nobody is warned."""

from __future__ import annotations

import math

from contrastive.ranking.ranking_metrics import RankingValues
from dlrm.config import GuardConfig
from dlrm.metrics.metrics import CHANCE_STANDARD_ERRORS

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
        last: whether two at chance are enough.
    """
    if guards.constant_prediction and 2 * values.ties > num_items:
        return (
            f"{values.ties:,.0f} of {num_items:,} items score what the right one does, as the mean over "
            f"{values.users:,} users; the model cannot tell items apart: {CURE}, or raise --tables.init-scale"
        )
    limit = guards.chance_evaluations
    if not limit or evaluations_at_chance < (min(2, limit) if last else limit):
        return None
    if (cutoff := _same_items(values, num_items)) is not None:
        found = f"all of {values.users:,} users are told the same {cutoff} items"
    else:
        cutoff = _cutoff(values, num_items)
        found = (
            f"recall@{cutoff} is {values.recall[cutoff]:.4f} on {values.users:,} users, which cannot be told from the "
            f"{cutoff / num_items:.4f} of items drawn at random"
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
    cutoff = _cutoff(values, num_items)
    share = cutoff / num_items
    if share >= 1:
        return False
    error = math.sqrt(share * (1 - share) / values.users)  # of a mean of draws that hit or miss
    return values.recall[cutoff] - share < CHANCE_STANDARD_ERRORS * error


def _cutoff(values: RankingValues, num_items: int) -> int:
    """Return the longest list that most items are not in, as more hits tell more."""
    return max((cutoff for cutoff in values.recall if 4 * cutoff <= num_items), default=min(values.recall))

"""Two views of each history, by two different operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contrastive.augment.draws import Draws
from contrastive.augment.operators import Augmentation
from contrastive.data.ragged import Ragged, spans
from contrastive.data.sequences import PAD
from dlrm.data.dataset import IntArray

VIEWS = 2
_CHOICE, _OPERATOR = 0, 1


def draw_views(operators: Sequence[Augmentation], histories: Ragged, draws: Draws) -> tuple[Ragged, Ragged]:
    """Return two views of each history: two operators, drawn for each without replacement; one serves both views.

    A history of one item is its own view.

    Args:
        operators: at least one.
        histories: B histories of ids of items.
        draws: random numbers of each.

    Raises:
        ValueError: an operator breaks its promise (see `Augmentation`).
    """
    long = np.flatnonzero(histories.lengths > 1)
    chosen = _choose(len(operators), draws.take(long).fork(_CHOICE))
    size = len(histories.lengths)
    # Both views at once, one behind the other: each operator is called once.
    numbers, chosen_of = np.concatenate([long, long]), np.concatenate(chosen)
    purposes = _OPERATOR + np.repeat(np.arange(VIEWS), len(long))
    places = numbers + np.repeat([0, size], len(long))
    lengths = np.tile(histories.lengths, VIEWS)
    pieces = [
        (np.concatenate([short := np.flatnonzero(histories.lengths <= 1), short + size]), _twice(histories, short))
    ]
    for number, operator in enumerate(operators):
        here = np.flatnonzero(chosen_of == number)
        given = histories.take(numbers[here])
        view = operator(given, draws.take(numbers[here]).fork(purposes[here]))
        _check(operator, given, view)
        lengths[places[here]] = view.lengths
        pieces.append((places[here], view))
    firsts = np.cumsum(lengths) - lengths
    items = np.empty(int(lengths.sum()), dtype=histories.items.dtype)
    for where, view in pieces:
        items[spans(firsts[where], view.lengths)] = view.items
    cut = int(lengths[:size].sum())
    return Ragged(items[:cut], lengths[:size]), Ragged(items[cut:], lengths[size:])


def _choose(count: int, draws: Draws) -> tuple[IntArray, IntArray]:
    """Return which operator makes each view: different ones, where there are several."""
    bounds = np.full(len(draws.keys), count)
    first = draws.below(bounds, 0)
    if count == 1:
        return first, first
    second = draws.below(bounds - 1, 1)
    return first, second + (second >= first)


def _twice(histories: Ragged, lists: IntArray) -> Ragged:
    taken = histories.take(lists)
    return Ragged(np.tile(taken.items, VIEWS), np.tile(taken.lengths, VIEWS))


def _check(operator: Augmentation, given: Ragged, view: Ragged) -> None:
    if len(view.lengths) != len(given.lengths) or len(view.items) != view.lengths.sum() or (view.lengths < 1).any():
        raise ValueError(
            f"expected {operator} to give {len(given.lengths)} histories of at least one item, got "
            f"{len(view.lengths)} of {view.lengths.min(initial=0)} to {view.lengths.max(initial=0)} items, "
            f"{len(view.items)} items in all"
        )
    if view.items.min(initial=PAD) < PAD:  # which would be counted from the catalogue's end
        raise ValueError(f"expected {operator} to give ids of items, got {view.items.min()}")

"""The operators of CL4SRec (Xie et al. 2022, "Contrastive learning for sequential recommendation"), for whole batches.

Counts are rounded down as in MCLRec's code, which is where the shares come from as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from contrastive.augment.draws import Draws
from contrastive.data.ragged import Ragged, spans
from contrastive.data.sequences import PAD
from dlrm.data.dataset import IntArray

_SORTED_BITS = 40  # of the random numbers by which items are put in order; the bits above hold the list's number
_MOST_LISTS = 1 << (64 - _SORTED_BITS)


class Augmentation(Protocol):
    """Makes other histories of histories.

    It must depend on each history and its draws alone, so that a sample has the same view in whatever batch it comes:
    no state, no other random numbers. Any function of this form can stand among the operators of `draw_views`, and its
    name in `--sequence.operators`.
    """

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        """Return the new histories.

        Args:
            histories: of ids of items, each of at least two; not to be written to.
            draws: random numbers for each.

        Returns:
            As many histories, each of at least one item, not all of them PAD, and no longer than
            `--sequence.max-length`.
        """


@dataclass(frozen=True)
class Crop:
    """Keeps a stretch of consecutive items, anywhere.

    Attributes:
        ratio: share of the items that is cut away.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio, 0.0 <= self.ratio < 1.0, "in [0, 1)")

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        """See `Augmentation`."""
        counts = np.maximum(_share(histories.lengths, 1 - self.ratio), 1)
        starts = draws.below(histories.lengths - counts + 1, 0)
        return Ragged(histories.items[spans(histories.firsts + starts, counts)], counts)


@dataclass(frozen=True)
class Mask:
    """Hides items: PAD takes their place.

    Attributes:
        ratio: share of the items that is hidden.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio, 0.0 <= self.ratio < 1.0, "in [0, 1)")

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        """See `Augmentation`."""
        firsts, lengths = histories.firsts, histories.lengths
        order = _shuffle(np.arange(len(histories.items)), lengths, draws)
        counts = np.minimum(_share(lengths, self.ratio), lengths - 1)
        items = histories.items.copy()
        items[order[spans(firsts, counts)]] = PAD
        return Ragged(items, lengths)


@dataclass(frozen=True)
class Reorder:
    """Shuffles a stretch of consecutive items, anywhere.

    Attributes:
        ratio: share of the items that lies in it.
    """

    ratio: float = 0.8

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio, 0.0 <= self.ratio <= 1.0, "in [0, 1]")

    def __call__(self, histories: Ragged, draws: Draws) -> Ragged:
        """See `Augmentation`."""
        counts = _share(histories.lengths, self.ratio)
        starts = draws.below(histories.lengths - counts + 1, 0)
        window = spans(histories.firsts + starts, counts)
        items = histories.items.copy()
        items[window] = items[_shuffle(window, counts, draws.fork(0))]
        return Ragged(items, histories.lengths)


def _check_ratio(operator: object, ratio: float, is_fine: bool, expected: str) -> None:
    if not is_fine:
        raise ValueError(f"{type(operator).__name__}: expected a ratio {expected}, got {ratio}")


def _share(lengths: IntArray, ratio: float) -> IntArray:
    counts: IntArray = np.floor(lengths * ratio).astype(np.int64)
    return counts


def _shuffle(places: IntArray, lengths: IntArray, draws: Draws) -> IntArray:
    """Return the places of each list in a random order; the lists stay where they are.

    The k first of a list are k different places of it, any of them equally likely.
    """
    if len(lengths) > _MOST_LISTS:
        raise ValueError(
            f"expected at most {_MOST_LISTS} histories at a time, got {len(lengths)}; lower the batch size"
        )
    lists = np.repeat(np.arange(len(lengths)), lengths)
    numbers = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    words = draws.take(lists).words(numbers + 1)  # number 0 has been drawn for the stretch's start
    return places[
        np.argsort(lists.astype(np.uint64) << np.uint64(_SORTED_BITS) | words >> np.uint64(64 - _SORTED_BITS))
    ]

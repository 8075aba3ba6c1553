"""Ranks among a whole catalogue, block by block, so that neither a million items nor a million users need much memory.

Blocks of scores come from float32 matrix products, whose rounding depends on shapes, threads and libraries. They only
rule out what cannot matter: scores that lie closer together than products of that length can be off are compared by
float64 sums in one fixed order. Ranks, ties and lists are thus those of the exact vectors, whatever the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrastive.data.sequences import PAD
from contrastive.ranking import scan_kernels as kernels
from dlrm.diverged import DivergedError
from embeddings.kernels.threads import run_all

_USERS, _ITEMS = 512, 1024  # of a block: 2 MiB of scores, which stay in the processor's cache
_ROUNDING = 2.0**-24  # largest relative error of a float32 operation
_SMALLEST = 2.0**-126  # smaller numbers may be taken for zero

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


class Seen(NamedTuple):
    """What each user has seen, one after the other.

    Attributes:
        offsets: [b + 1] int64, where each user's items begin, and where the last one's end.
        items: [offsets[-1]] int64; PAD and repetitions do no harm.
    """

    offsets: Tensor
    items: Tensor


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Where targets stand among all items, and which items stand first.

    Attributes:
        ranks: [b] int64: 1 + items that score higher + `ties`; empty without targets.
        ties: [b] int64: other items that score exactly what the target does, all counted against it.
        items: [b, top] int64, best first, of equal scores the lower item first; PAD where too few are left.
        scores: [b, top] float64; minus infinity where too few are left.
    """

    ranks: Tensor
    ties: Tensor
    items: Tensor
    scores: Tensor


def rank_items(
    vectors: Tensor, items: Tensor, *, targets: Tensor | None = None, top: int = 0, seen: Seen | None = None
) -> Ranking:
    """Rank all items for each user by the inner product of their vectors.

    Args:
        vectors: [b, dim] of users, any floating type and device; numbers beyond float32 are rounded to it.
        items: [n, dim], by id; row 0 is PAD, which is never ranked.
        targets: [b] int64 in [1, n): whose ranks are wanted.
        top: how many of the best items are wanted.
        seen: left out of the ranking, but for the target itself: who comes back to an item is to be found.

    Raises:
        ValueError: other shapes; or a target or a seen item that is not in the catalogue.
        DivergedError: a vector is not finite, or so long that scores are not.
    """
    _check_shapes(vectors, items, targets, top, seen)
    users, catalogue = _as_floats(vectors), _as_floats(items)
    asked = _as_longs(targets) if targets is not None else np.full(len(users), -1, np.int64)
    offsets, seen_items = _as_csr(seen, len(users), len(catalogue))
    if targets is not None:
        _check_items(asked, 1, len(catalogue), "targets")
    margins = _find_margins(vectors, items)
    ranks = np.empty(len(users), np.int64)
    ties = np.zeros(len(users), np.int64)
    best_items = np.zeros((len(users), top), np.int64)
    best_scores = np.full((len(users), top), -np.inf)
    scratch = torch.empty(_USERS * _ITEMS)
    for first in range(0, len(users), _USERS):
        part = slice(first, first + _USERS)
        scan = _Scan(users[part], catalogue, asked[part], margins[part], top)
        scan.run(offsets[first : first + _USERS + 1], seen_items, scratch)
        ranks[part], ties[part] = 1 + scan.higher + scan.ties, scan.ties
        scan.write_best(best_items[part], best_scores[part])
    if targets is None:
        ranks = ties = np.empty(0, np.int64)
    return Ranking(
        ranks=torch.from_numpy(ranks),
        ties=torch.from_numpy(ties),
        items=torch.from_numpy(best_items),
        scores=torch.from_numpy(best_scores),
    )


class _Scan:
    """The way of some users through all blocks of items."""

    def __init__(self, users: Floats, catalogue: Floats, targets: Longs, margins: Floats, top: int) -> None:
        self.users, self.catalogue, self.targets, self.margins, self.top = users, catalogue, targets, margins, top
        count, room = len(users), 4 * top + 64
        self.higher, self.ties = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.target_scores = np.zeros(count)
        kernels.exact_products(users, catalogue, np.maximum(targets, PAD), self.target_scores)
        # Seen items score minus infinity, all others more than this.
        lowest = np.finfo(np.float32).min if top else np.inf
        self.thresholds = np.full(count, lowest, np.float32)
        self.found = np.zeros(count, np.int64)
        self.found_scores = np.empty((count, room if top else 1), np.float32)
        self.found_items = np.empty((count, room if top else 1), np.int64)
        self.offsets = self.seen = np.zeros(0, np.int64)

    def run(self, offsets: Longs, seen: Longs, scratch: Tensor) -> None:
        self.offsets, self.seen = offsets, seen
        users = torch.from_numpy(self.users)
        for first in range(1, len(self.catalogue), _ITEMS):
            items = torch.from_numpy(self.catalogue[first : first + _ITEMS])
            block = scratch[: len(users) * len(items)].view(len(users), len(items))
            with _full_precision():
                torch.mm(users, items.T, out=block)
            self._look_through(block.numpy(), first)

    def _look_through(self, scores: Floats, first_item: int) -> None:
        per_task = -(-len(self.users) // torch.get_num_threads())
        parts = [slice(first, first + per_task) for first in range(0, len(self.users), per_task)]
        run_all([partial(self._look_through_part, scores, first_item, part) for part in parts])

    def _look_through_part(self, scores: Floats, first_item: int, part: slice) -> None:
        kernels.scan_block(
            scores[part],
            first_item,
            self.users[part],
            self.catalogue,
            self.targets[part],
            self.target_scores[part],
            self.margins[part],
            self.offsets[part.start : part.stop + 1],
            self.seen,
            self.top,
            self.thresholds[part],
            self.higher[part],
            self.ties[part],
            self.found[part],
            self.found_scores[part],
            self.found_items[part],
        )

    def write_best(self, items: Longs, scores: Doubles) -> None:
        if not self.top:
            return
        kernels.sort_found(
            self.users,
            self.catalogue,
            self.margins,
            self.top,
            self.found,
            self.found_scores,
            self.found_items,
            items,
            scores,
        )
        for row in np.flatnonzero(self.found == kernels.OVERFLOWN).tolist():
            seen = self.seen[self.offsets[row] : self.offsets[row + 1]]
            self._write_best_of_all(row, seen[seen != self.targets[row]], items[row], scores[row])

    def _write_best_of_all(self, row: int, hidden: Longs, items: Longs, scores: Doubles) -> None:
        """Find the best where too many scores could not be told apart, as those of vectors that have collapsed."""
        every = np.empty(len(self.catalogue))
        kernels.score_all(self.users[row], self.catalogue, every)
        every[PAD] = every[hidden] = -np.inf
        last = np.partition(every, -self.top)[-self.top]  # of more candidates than are wanted
        better = np.flatnonzero(every > last)
        best = np.concatenate([better, np.flatnonzero(every == last)[: self.top - len(better)]])
        best = best[np.lexsort((best, -every[best]))]
        items[:], scores[:] = best, every[best]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 as such, whatever the model's may be computed in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _find_margins(vectors: Tensor, items: Tensor) -> Floats:
    """Return [b] how far a float32 score may be from the exact one (Higham 2002, section 3.1), and half as much more.

    A sum of `dim` products is off by at most dim * 2**-24 of the sum of their sizes, which is no more than the product
    of both lengths (Cauchy-Schwarz).
    """
    lengths, longest = _find_lengths(vectors, "users' vectors"), _find_lengths(items, "items' vectors").amax()
    reach = lengths * longest
    if len(reach) and float(reach.amax()) >= torch.finfo(torch.float32).max:
        raise DivergedError(
            f"expected scores that float32 can hold, got vectors of lengths up to {float(lengths.amax()):.3g} and "
            f"{float(longest):.3g} (the model has diverged: lower --dense.learning-rate)"
        )
    dim = vectors.shape[1]
    margins: Floats = ((2 * dim + 4) * _ROUNDING * reach + (dim + 1) * _SMALLEST).float().cpu().numpy()
    return margins


def _find_lengths(vectors: Tensor, name: str) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors.detach().float(), dim=1, dtype=torch.float64)
    wrong = torch.nonzero(~torch.isfinite(lengths))
    if len(wrong):
        raise DivergedError(
            f"{name}: expected finite numbers, got others in row {int(wrong[0])} and {len(wrong) - 1} more "
            "(the model has diverged: lower --dense.learning-rate)"
        )
    return lengths


def _as_floats(vectors: Tensor) -> Floats:
    floats: Floats = vectors.detach().float().cpu().contiguous().numpy()
    return floats


def _as_longs(numbers: Tensor) -> Longs:
    longs: Longs = numbers.detach().long().cpu().contiguous().numpy()
    return longs


def _as_csr(seen: Seen | None, users: int, rows: int) -> tuple[Longs, Longs]:
    if seen is None:
        return np.zeros(users + 1, np.int64), np.zeros(0, np.int64)
    offsets, items = _as_longs(seen.offsets), _as_longs(seen.items)
    if offsets[0] < 0 or offsets[-1] > len(items) or np.any(np.diff(offsets) < 0):
        raise ValueError(f"seen.offsets: expected ascending numbers in [0, {len(items)}], got others")
    _check_items(items, PAD, rows, "seen.items")
    return offsets, items


def _check_items(items: Longs, lowest: int, rows: int, name: str) -> None:
    wrong = np.flatnonzero((items < lowest) | (items >= rows))
    if wrong.size:
        raise ValueError(f"{name}[{wrong[0]}]: expected an item in [{lowest}, {rows}), got {items[wrong[0]]}")


def _check_shapes(vectors: Tensor, items: Tensor, targets: Tensor | None, top: int, seen: Seen | None) -> None:
    if vectors.ndim != 2 or items.ndim != 2 or vectors.shape[1] != items.shape[1] or len(items) < 2:
        raise ValueError(
            "expected vectors [b, dim] and items [n, dim], n > 1, "
            f"got shapes {list(vectors.shape)} and {list(items.shape)}"
        )
    if targets is not None and targets.shape != vectors.shape[:1]:
        raise ValueError(f"targets: expected shape [{len(vectors)}], got {list(targets.shape)}")
    if seen is not None and seen.offsets.shape != (len(vectors) + 1,):
        raise ValueError(f"seen.offsets: expected shape [{len(vectors) + 1}], got {list(seen.offsets.shape)}")
    if top < 0:
        raise ValueError(f"top: expected 0 or more, got {top}")

"""Looks through blocks of scores for what decides a ranking, compiled by Numba; see ``ranks`` for the method.

Scores of a block are float32, each within ``margins`` of the exact one, which is the float64 sum of ``exact_product``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled, inlined

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]

_CHUNK = 64  # scores that are counted together; few chunks hold one that must be looked at
_1, _2, _3 = np.uint64(1), np.uint64(2), np.uint64(3)
OVERFLOWN = -1


@compiled
def exact_product(a: Floats, b: Floats) -> float:
    """Returns the inner product of two vectors: equal for equal vectors, wherever they lie in memory.

    Products of float32 are exact in float64, and they are summed in one order.
    """
    s0 = s1 = s2 = s3 = 0.0
    whole = a.size - a.size % 4
    for first in range(0, whole, 4):
        at = np.uint64(first)
        s0 += np.float64(a[at]) * np.float64(b[at])
        s1 += np.float64(a[at + _1]) * np.float64(b[at + _1])
        s2 += np.float64(a[at + _2]) * np.float64(b[at + _2])
        s3 += np.float64(a[at + _3]) * np.float64(b[at + _3])
    for last in range(whole, a.size):
        s0 += np.float64(a[np.uint64(last)]) * np.float64(b[np.uint64(last)])
    return (s0 + s1) + (s2 + s3)


@compiled
def exact_products(vectors: Floats, items: Floats, pairs: Longs, products: Doubles) -> None:
    """Writes the product of each vector [b, dim] with the item that ``pairs`` [b] names."""
    for row in range(pairs.size):
        products[row] = exact_product(vectors[row], items[pairs[row]])


@compiled
def score_all(vector: Floats, items: Floats, scores: Doubles) -> None:
    """Writes the exact score of every item [n]."""
    for item in range(items.shape[0]):
        scores[item] = exact_product(vector, items[item])


@inlined
def _count(scores: Any, first: Any, last: Any, low: Any, high: Any, threshold: Any) -> Any:
    above, from_low, from_threshold = 0, 0, 0
    for at in range(first, last):
        score = scores[np.uint64(at)]
        above += score > high
        from_low += score >= low
        from_threshold += score >= threshold
    return above, from_low - above, from_threshold


@inlined
def _hide(scores: Any, first_item: Any, seen: Any, target: Any) -> None:
    for item in seen:
        if item != target and first_item <= item < first_item + scores.size:
            scores[item - first_item] = -np.inf


@compiled
def _keep_best(scores: Floats, items: Longs, used: int, top: int, margin: np.float32) -> tuple[int, np.float32]:
    # Drops what cannot be among the best `top` in exact scores either; the order stays. Returns how many are left, and
    # what a score needs to join them.
    threshold = np.float32(np.partition(scores[:used], used - top)[used - top] - np.float32(2) * margin)
    kept = 0
    for at in range(used):
        if scores[at] >= threshold:
            scores[kept], items[kept] = scores[at], items[at]
            kept += 1
    return kept, threshold


@compiled
def scan_block(
    scores: Floats,  # [b, items of the block]; those of seen items are overwritten
    first_item: int,  # of the block
    vectors: Floats,  # [b, dim]
    items: Floats,  # [n, dim], of all blocks
    targets: Longs,  # [b], or -1: not asked for
    target_scores: Doubles,  # [b], exact
    margins: Floats,  # [b]
    seen_offsets: Longs,  # [b + 1]
    seen_items: Longs,
    top: int,  # items wanted of each, or 0
    thresholds: Floats,  # [b], changed: what a score needs to be among the best; infinite if nothing is wanted
    higher: Longs,  # [b], changed: items that score more than the target
    ties: Longs,  # [b], changed: other items that score the same
    found: Longs,  # [b], changed: how many candidates there are, or OVERFLOWN
    found_scores: Floats,  # [b, room], changed
    found_items: Longs,  # [b, room], changed: ascending
) -> None:
    """Counts a block's items that score above the targets, and collects candidates for the best ones."""
    width = scores.shape[1]
    room = found_items.shape[1]
    for row in range(scores.shape[0]):
        line, target, margin = scores[row], targets[row], margins[row]
        _hide(line, first_item, seen_items[seen_offsets[row] : seen_offsets[row + 1]], target)
        low = high = np.float32(np.inf)
        if target >= 0:
            low, high = np.float32(target_scores[row] - margin), np.float32(target_scores[row] + margin)
        for first in range(0, width, _CHUNK):
            last = min(first + _CHUNK, width)
            above, near, candidates = _count(line, first, last, low, high, thresholds[row])
            higher[row] += above
            if near:
                for at in range(first, last):
                    if low <= line[at] <= high and first_item + at != target:
                        exact = exact_product(vectors[row], items[first_item + at])
                        higher[row] += exact > target_scores[row]
                        ties[row] += exact == target_scores[row]
            if candidates:
                for at in range(first, last):
                    if line[at] >= thresholds[row]:
                        found_scores[row, found[row]], found_items[row, found[row]] = line[at], first_item + at
                        found[row] += 1
                        if found[row] == room:
                            found[row], thresholds[row] = _keep_best(
                                found_scores[row], found_items[row], room, top, margin
                            )
                            if found[row] > room - room // 4:  # hardly worth it: they cannot be told apart
                                found[row], thresholds[row] = OVERFLOWN, np.inf


@compiled
def sort_found(
    vectors: Floats,  # [b, dim]
    items: Floats,  # [n, dim]
    margins: Floats,  # [b]
    top: int,
    found: Longs,  # [b], changed
    found_scores: Floats,  # [b, room], changed
    found_items: Longs,  # [b, room], changed
    best_items: Longs,  # [b, top], written where not overflown; zeros beyond the last
    best_scores: Doubles,  # [b, top], written likewise; minus infinity beyond the last
) -> None:
    """Writes the candidates of highest exact score, best first; of equal ones the lower item first."""
    for row in range(found.size):
        used = 0
        if found[row] > top:
            found[row], _ = _keep_best(found_scores[row], found_items[row], found[row], top, margins[row])
        for at in range(max(found[row], 0)):
            item = found_items[row, at]
            score = exact_product(vectors[row], items[item])
            place = used
            while place > 0 and best_scores[row, place - 1] < score:
                place -= 1
            if place == best_items.shape[1]:
                continue
            used = min(used + 1, best_items.shape[1])
            for later in range(used - 1, place, -1):
                best_items[row, later], best_scores[row, later] = (
                    best_items[row, later - 1],
                    best_scores[row, later - 1],
                )
            best_items[row, place], best_scores[row, place] = item, score

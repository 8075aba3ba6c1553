"""Attention along each history and its gradient, compiled by Numba: no padding, no gathering, no masks in memory.

Heads and rows are as wide as some registers. Each function works on some histories, in the calling thread and without
the interpreter's lock. Attention weights are kept for the gradient, [heads, L, L] a history of L slots, from its own
number in `pairs` on; what dropout makes of them is drawn again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store, total

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Chances = NDArray[np.uint16]

HIDDEN_SCORE = np.float32(-1e4)


@compiled
def dot(a: Floats, at_a: int, b: Floats, at_b: int, width: int) -> Any:
    """Return the product of two rows, which begin at `at_a` and `at_b`."""
    products = multiply_add(load(a, at_a), load(b, at_b), splat(np.float32(0)))
    for c in range(LANES, width, LANES):
        products = multiply_add(load(a, at_a + c), load(b, at_b + c), products)
    return total(products)


@compiled
def take_softmax(scores: Floats) -> None:
    """Replace scores by their softmax."""
    top = scores.max()
    weight = np.float32(0)
    for j in range(scores.size):
        scores[j] = np.exp(scores[j] - top)
        weight += scores[j]
    for j in range(scores.size):
        scores[j] /= weight


@compiled
def _drop(weights: Floats, chances: Chances, kept: np.uint16, scale: np.float32, out: Floats) -> None:
    if chances.size:
        for j in range(weights.size):
            out[j] = weights[j] * scale if chances[j] < kept else np.float32(0)
    else:
        for j in range(weights.size):
            out[j] = weights[j]


@compiled
def _sum_rows(
    weights: Floats,
    at_weight: int,
    weight_stride: int,
    count: int,
    rows: Floats,
    at_row: int,
    row_stride: int,
    width: int,
    out: Floats,
    at_out: int,
) -> None:
    """Writes the weighted sum of `count` rows, which lie `row_stride` apart as their weights do `weight_stride`."""
    for c in range(0, width, 2 * LANES):
        # The last register of an odd number of them is computed twice rather than in a loop of its own.
        p, q = at_row + c, at_row + min(c + LANES, width - LANES)
        first, second = splat(np.float32(0)), splat(np.float32(0))
        for j in range(count):
            weight = splat(weights[at_weight + j * weight_stride])
            first = multiply_add(weight, load(rows, p + j * row_stride), first)
            second = multiply_add(weight, load(rows, q + j * row_stride), second)
        store(out, at_out + c, first)
        store(out, at_out + min(c + LANES, width - LANES), second)


@compiled
def attend(
    projected: Floats,
    starts: Integers,
    pairs: Integers,
    unmasked: Flags,
    hidden: Flags,
    heads: int,
    dim: int,
    chances: Chances,
    kept: np.uint16,
    scale: np.float32,
    weights: Floats,
    out: Floats,
    first: int,
    last: int,
) -> None:
    """Writes what each slot of histories `first` to `last` makes of its history up to itself.

    Args:
        projected: [S * 3 * dim]: queries, keys and values of each slot, heads side by side in each.
        starts: [B + 1], first slot of each history.
        pairs: [B + 1], where the attention weights of each history begin.
        unmasked: [B], histories whose slots see all others.
        hidden: [S], slots that nobody sees who sees others; or empty.
        heads: Number of heads.
        dim: Of a vector, all heads.
        chances: Number of each weight that dropout compares with `kept`; or empty.
        kept: Chances below which a weight is kept.
        scale: Factor of a kept weight.
        weights: [pairs[B]], written: the attention before dropout.
        out: [S * dim], written: heads side by side.
        first: First history.
        last: History after the last one.
    """
    width, stride = dim // heads, 3 * dim
    shrink = np.float32(1 / np.sqrt(width))
    dropped = np.empty(np.max(starts[first + 1 : last + 1] - starts[first:last]), np.float32)
    for history in range(first, last):
        start, length = starts[history], starts[history + 1] - starts[history]
        for head in range(heads):
            at = start * stride + head * width
            for i in range(length):
                seen = length if unmasked[history] else i + 1
                pair = pairs[history] + (head * length + i) * length
                row = weights[pair : pair + seen]
                for j in range(seen):
                    row[j] = shrink * dot(projected, at + i * stride, projected, at + dim + j * stride, width)
                    if hidden.size and hidden[start + j] and not unmasked[history]:
                        row[j] += HIDDEN_SCORE
                take_softmax(row)
                _drop(row, chances[pair : pair + seen], kept, scale, dropped)
                target = (start + i) * dim + head * width
                _sum_rows(dropped, 0, 1, seen, projected, at + 2 * dim, stride, width, out, target)


@compiled
def attend_gradient(
    projected: Floats,
    starts: Integers,
    pairs: Integers,
    unmasked: Flags,
    heads: int,
    dim: int,
    chances: Chances,
    kept: np.uint16,
    scale: np.float32,
    weights: Floats,
    gradient: Floats,
    out: Floats,
    first: int,
    last: int,
) -> None:
    """Writes the gradient of `projected`, `out`, given that of `attend`'s output; arguments are those of `attend`."""
    width, stride = dim // heads, 3 * dim
    shrink = np.float32(1 / np.sqrt(width))
    longest = np.max(starts[first + 1 : last + 1] - starts[first:last])
    # What each query gives to the gradients of the keys and values it sees: [query, key].
    scores, shares = np.empty(longest * longest, np.float32), np.empty(longest * longest, np.float32)
    for history in range(first, last):
        start, length = starts[history], starts[history + 1] - starts[history]
        for head in range(heads):
            at, at_gradient = start * stride + head * width, start * dim + head * width
            for i in range(length):
                seen = length if unmasked[history] else i + 1
                pair = pairs[history] + (head * length + i) * length
                attention, chance = weights[pair : pair + seen], chances[pair : pair + seen]
                row = scores[i * length : i * length + seen]
                for j in range(seen):
                    row[j] = dot(gradient, at_gradient + i * dim, projected, at + 2 * dim + j * stride, width)
                _drop(row, chance, kept, scale, row)
                _drop(attention, chance, kept, scale, shares[i * length : i * length + seen])
                _take_softmax_gradient(attention, row, shrink)
                _sum_rows(scores, i * length, 1, seen, projected, at + dim, stride, width, out, at + i * stride)
            for j in range(length):
                i = 0 if unmasked[history] else j
                pair, seers, target = i * length + j, length - i, at + j * stride
                _sum_rows(scores, pair, length, seers, projected, at + i * stride, stride, width, out, target + dim)
                _sum_rows(
                    shares, pair, length, seers, gradient, at_gradient + i * dim, dim, width, out, target + 2 * dim
                )


@compiled
def _take_softmax_gradient(attention: Floats, row: Floats, shrink: np.float32) -> None:
    mean = np.float32(0)
    for j in range(row.size):
        mean += attention[j] * row[j]
    for j in range(row.size):
        row[j] = attention[j] * (row[j] - mean) * shrink

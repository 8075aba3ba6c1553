"""Attention of one query a history and head to the history's own vectors, and its gradient, compiled by Numba."""

from __future__ import annotations

import numpy as np

from contrastive.encoders.attention_kernels import HIDDEN_SCORE, Chances, Flags, Floats, Integers, dot, take_softmax
from embeddings.kernels.compiled import compiled
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store


@compiled
def attend_from_last(
    queries: Floats,
    vectors: Floats,
    starts: Integers,
    unmasked: Flags,
    hidden: Flags,
    heads: int,
    dim: int,
    chances: Chances,
    kept: np.uint16,
    scale: np.float32,
    weights: Floats,
    out: Floats,
    mass: Floats,
    first: int,
    last: int,
) -> None:
    """Writes the weighted sums of vectors and the sums of their weights, of histories `first` to `last`.

    Args:
        queries: [B * heads * dim], scaled.
        vectors: [S * dim], keys and values at once.
        starts: [B + 1], first slot of each history.
        unmasked: [B], histories in which hidden slots are seen.
        hidden: [S], slots that are not seen; or empty.
        heads: Number of heads.
        dim: Of a vector.
        chances: Number of each weight that dropout compares with `kept`; or empty.
        kept: Chances below which a weight is kept.
        scale: Factor of a kept weight.
        weights: [heads * S], written: the attention before dropout, head by head in each history.
        out: [B * heads * dim], written.
        mass: [B * heads], written.
        first: First history.
        last: History after the last one.
    """
    for history in range(first, last):
        start, length = starts[history], starts[history + 1] - starts[history]
        for head in range(heads):
            query = (history * heads + head) * dim
            pair = start * heads + head * length
            row = weights[pair : pair + length]
            for j in range(length):
                row[j] = dot(queries, query, vectors, (start + j) * dim, dim)
                if hidden.size and hidden[start + j] and not unmasked[history]:
                    row[j] += HIDDEN_SCORE
            take_softmax(row)
            mass[history * heads + head] = 0
            for c in range(0, dim, LANES):
                store(out, query + c, splat(np.float32(0)))
            for j in range(length):
                if not chances.size or chances[pair + j] < kept:
                    share = row[j] * scale
                    mass[history * heads + head] += share
                    for c in range(0, dim, LANES):
                        vector = load(vectors, (start + j) * dim + c)
                        store(out, query + c, multiply_add(splat(share), vector, load(out, query + c)))


@compiled
def attend_from_last_gradient(
    queries: Floats,
    vectors: Floats,
    starts: Integers,
    heads: int,
    dim: int,
    chances: Chances,
    kept: np.uint16,
    scale: np.float32,
    weights: Floats,
    gradient: Floats,
    mass_gradient: Floats,
    queries_gradient: Floats,
    vectors_gradient: Floats,
    first: int,
    last: int,
) -> None:
    """Writes the gradients of queries and vectors, given those of `attend_from_last`'s two outputs.

    Other arguments are those of `attend_from_last`.
    """
    row = np.empty(np.max(starts[first + 1 : last + 1] - starts[first:last]), np.float32)
    for history in range(first, last):
        start, length = starts[history], starts[history + 1] - starts[history]
        for slot in range(start * dim, (start + length) * dim, LANES):
            store(vectors_gradient, slot, splat(np.float32(0)))
        for head in range(heads):
            query = (history * heads + head) * dim
            pair = start * heads + head * length
            attention = weights[pair : pair + length]
            mean = np.float32(0)
            for j in range(length):
                row[j] = 0
                if not chances.size or chances[pair + j] < kept:
                    product = dot(gradient, query, vectors, (start + j) * dim, dim)
                    row[j] = scale * (product + mass_gradient[history * heads + head])
                mean += attention[j] * row[j]
            for c in range(0, dim, LANES):
                store(queries_gradient, query + c, splat(np.float32(0)))
            for j in range(length):
                score = splat(attention[j] * (row[j] - mean))
                kept_here = not chances.size or chances[pair + j] < kept
                share = splat(attention[j] * scale if kept_here else np.float32(0))
                for c in range(0, dim, LANES):
                    slot = (start + j) * dim + c
                    own = multiply_add(score, load(queries, query + c), load(vectors_gradient, slot))
                    store(vectors_gradient, slot, multiply_add(share, load(gradient, query + c), own))
                    change = multiply_add(score, load(vectors, slot), load(queries_gradient, query + c))
                    store(queries_gradient, query + c, change)

"""Dot products of all pairs of a sample's vectors, and their gradient, compiled by Numba.

As batched matrix products this reads, writes and multiplies every pair twice and gathers the triangle afterwards; here
a sample's vectors are loaded once, stay in the nearest cache, and each pair is multiplied once. Each function works on
some samples, in the calling thread and without the interpreter's lock.

The vectors of a sample are ``dense`` and those in ``pooled``, side by side; they are copied into rows that are padded
with zeros to whole registers, so that no loop has a remainder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store, total

Floats = NDArray[np.float32]

_PAIR_TILE = 3  # 3 x 3 products at a time: 9 sums and 6 operands fit the registers
_ROW_TILE = 4  # 4 rows x 2 registers of gradients at a time


@compiled
def pairwise_dots(dense: Floats, pooled: Floats, out: Floats, first: int, last: int) -> None:
    """Writes ``out[first:last]``: ``dense``, then the products of vectors ``i > j``, row by row of the triangle.

    Args:
        dense: [batch_size, dim].
        pooled: [batch_size, (num_vectors - 1) * dim].
        out: [batch_size, dim + num_vectors * (num_vectors - 1) / 2].
        first: First sample.
        last: Sample after the last one.
    """
    dim = dense.shape[1]
    num_vectors = 1 + pooled.shape[1] // dim
    width = (dim + LANES - 1) // LANES * LANES
    rows = (num_vectors + _PAIR_TILE - 1) // _PAIR_TILE * _PAIR_TILE
    x = np.zeros(rows * width, np.float32)
    # Padded rows come last in the triangle, so that what is wanted is its beginning.
    triangle = np.empty(rows * (rows - 1) // 2, np.float32)
    for sample in range(first, last):
        _load_vectors(dense[sample], pooled[sample], width, x)
        for i in range(0, rows, _PAIR_TILE):
            for j in range(0, i + 1, _PAIR_TILE):
                _multiply_tile(x, width, i, j, triangle)
        target = out[sample]
        for d in range(dim):
            target[d] = x[d]
        products = target[dim:]
        for pair in range(products.size):
            products[pair] = triangle[pair]


@compiled
def _load_vectors(dense: Floats, pooled: Floats, width: int, x: Floats) -> None:
    dim = dense.size
    for d in range(dim):
        x[d] = dense[d]
    for vector in range(pooled.size // dim):
        source = pooled[vector * dim : (vector + 1) * dim]
        target = x[(vector + 1) * width :]
        for d in range(dim):
            target[d] = source[d]


@compiled
def _multiply_tile(x: Floats, width: int, i: int, j: int, triangle: Floats) -> None:
    zero = splat(np.float32(0))
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    c0, c1, c2 = zero, zero, zero
    for d in range(0, width, LANES):
        u0, u1, u2 = load(x, j * width + d), load(x, (j + 1) * width + d), load(x, (j + 2) * width + d)
        v = load(x, i * width + d)
        a0, a1, a2 = multiply_add(v, u0, a0), multiply_add(v, u1, a1), multiply_add(v, u2, a2)
        v = load(x, (i + 1) * width + d)
        b0, b1, b2 = multiply_add(v, u0, b0), multiply_add(v, u1, b1), multiply_add(v, u2, b2)
        v = load(x, (i + 2) * width + d)
        c0, c1, c2 = multiply_add(v, u0, c0), multiply_add(v, u1, c1), multiply_add(v, u2, c2)
    # row i of the triangle starts at i * (i - 1) / 2; the next row is i further, and the one after it i + 1
    a = i * (i - 1) // 2 + j
    b = a + i
    c = b + i + 1
    triangle[b], triangle[c], triangle[c + 1] = total(b0), total(c0), total(c1)
    if j < i:
        triangle[a], triangle[a + 1], triangle[a + 2] = total(a0), total(a1), total(a2)
        triangle[b + 1], triangle[b + 2], triangle[c + 2] = total(b1), total(b2), total(c2)


@compiled
def pairwise_dots_gradient(
    dense: Floats,
    pooled: Floats,
    gradient: Floats,
    dense_gradient: Floats,
    pooled_gradient: Floats,
    first: int,
    last: int,
) -> None:
    """Writes the gradients of samples ``first`` to ``last``, given that of ``pairwise_dots``' output.

    With L the triangle of a sample's output gradient, that of its vectors X is (L + L^T) X.
    """
    dim = dense.shape[1]
    num_vectors = 1 + pooled.shape[1] // dim
    width = (dim + LANES - 1) // LANES * LANES
    rows = (num_vectors + _ROW_TILE - 1) // _ROW_TILE * _ROW_TILE
    x, y = np.zeros(num_vectors * width, np.float32), np.empty(rows * width, np.float32)
    symmetric = np.zeros((rows, num_vectors), np.float32)
    for sample in range(first, last):
        _load_vectors(dense[sample], pooled[sample], width, x)
        given = gradient[sample]
        _unfold(given[dim:], symmetric)
        _multiply_symmetric(symmetric.reshape(-1), x, width, y)
        target = dense_gradient[sample]
        for d in range(dim):
            target[d] = given[d] + y[d]
        for vector in range(num_vectors - 1):
            target = pooled_gradient[sample, vector * dim : (vector + 1) * dim]
            source = y[(vector + 1) * width :]
            for d in range(dim):
                target[d] = source[d]


@compiled
def _unfold(triangle: Floats, symmetric: Floats) -> None:
    at = 0
    for i in range(1, symmetric.shape[1]):
        source = triangle[at : at + i]
        target = symmetric[i]
        for j in range(i):
            target[j] = source[j]
            symmetric[j, i] = source[j]
        at += i


@compiled
def _multiply_symmetric(symmetric: Floats, x: Floats, width: int, y: Floats) -> None:
    num_vectors = x.size // width
    zero = splat(np.float32(0))
    for i in range(0, y.size // width, _ROW_TILE):
        a, b, c, e = i * num_vectors, (i + 1) * num_vectors, (i + 2) * num_vectors, (i + 3) * num_vectors
        for d in range(0, width, 2 * LANES):
            # The last register of an odd number of them is computed twice rather than in a loop of its own.
            p, q = d, min(d + LANES, width - LANES)
            a0, a1, b0, b1, c0, c1, e0, e1 = zero, zero, zero, zero, zero, zero, zero, zero
            for j in range(num_vectors):
                u, v = load(x, j * width + p), load(x, j * width + q)
                s = splat(symmetric[a + j])
                a0, a1 = multiply_add(u, s, a0), multiply_add(v, s, a1)
                s = splat(symmetric[b + j])
                b0, b1 = multiply_add(u, s, b0), multiply_add(v, s, b1)
                s = splat(symmetric[c + j])
                c0, c1 = multiply_add(u, s, c0), multiply_add(v, s, c1)
                s = splat(symmetric[e + j])
                e0, e1 = multiply_add(u, s, e0), multiply_add(v, s, e1)
            at = i * width
            for first, second in ((a0, a1), (b0, b1), (c0, c1), (e0, e1)):
                store(y, at + p, first)
                store(y, at + q, second)
                at += width

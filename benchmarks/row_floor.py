"""What a lookup and an update of rows must cost whatever the code: the bytes they move, at the speed of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.prefetch import prefetch
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store
from embeddings.local.row_memory import zero_rows

_NUMBER_BYTES = 4
_AHEAD = 32  # rows that are asked for before they are touched


@dataclass(frozen=True, kw_only=True)
class Moved:
    """The bytes that forward and backward must read and write once."""

    of_rows: int
    """Rows and their optimizer's state: the lookup reads the former, the update reads and writes both."""
    of_vectors: int
    """Pooled vectors, written by the lookup, and their gradients, read by the update."""


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Bytes per second, read and written ones alike."""

    linear: float
    random: float


def moved(*, distinct_rows: int, vectors: int, dim: int, row_bytes: int, state_numbers: int) -> Moved:
    """Counts bytes; a row that many ids name is read once by the lookup, and read and written once by the update."""
    row, state = dim * row_bytes, state_numbers * _NUMBER_BYTES
    return Moved(of_rows=distinct_rows * (3 * row + 2 * state), of_vectors=2 * vectors * dim * _NUMBER_BYTES)


def floor_seconds(moved: Moved, bandwidth: Bandwidth, *, rows_are_linear: bool = False) -> float:
    """Says how long bytes take; with ``rows_are_linear`` as if rows lay side by side."""
    of_rows = moved.of_rows / (bandwidth.linear if rows_are_linear else bandwidth.random)
    return of_rows + moved.of_vectors / bandwidth.linear


def measure_bandwidth(total_bytes: int, dim: int, repeats: int) -> Bandwidth:
    """Measures a copy of memory side by side, and rows read and written in place in random order, on one thread."""
    source = torch.ones(total_bytes // _NUMBER_BYTES)
    target = torch.empty_like(source)
    linear = _median_seconds(lambda: target.copy_(source), repeats)
    rows = zero_rows(len(source) // dim, dim).fill_(1)
    order = np.random.default_rng(0).permutation(len(rows))
    random = _median_seconds(lambda: _touch_rows(rows.numpy(), order), repeats)
    return Bandwidth(linear=2 * total_bytes / linear, random=2 * total_bytes / random)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for number in range(repeats + 2):
        start = time.process_time()
        work()
        if number >= 2:
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


@compiled
def _touch_rows(rows: NDArray[np.float32], order: NDArray[np.int64]) -> None:
    flat, dim = rows.reshape(-1), rows.shape[1]
    two, minus_one = splat(np.float32(2)), splat(np.float32(-1))
    for i in range(order.size):
        if i + _AHEAD < order.size:
            prefetch(rows[np.uint64(order[i + _AHEAD])])
        start = order[i] * dim
        for at in range(start, start + dim - dim % LANES, LANES):
            # Twice itself minus one: ones stay ones, but no compiler may leave the store out.
            store(flat, at, multiply_add(load(flat, at), two, minus_one))

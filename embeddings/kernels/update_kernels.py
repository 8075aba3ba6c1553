"""The stages of a row optimizer's update, compiled by Numba: those of SGD and of both Adagrads.

A stage sees some rows and the sums of their gradients, in arrays that are the same for every optimizer, so that one
stage serves a block of rows in the nearest cache as well as all rows of a batch, whose norms several ranks add up
between two stages. A stage that measures writes sums over a row's columns into ``measured``; the last one finishes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from embeddings.kernels.compiled import compiled, reordering
from embeddings.kernels.grouping_kernels import Doubles, Floats, Keys

SUMS = 2  # most sums that a stage measures of a row
IDS, GAP = SUMS, SUMS + 1  # what COW_CLIP is told of a row: its ids in the batch, and the updates since its last one
MEASURES = SUMS + 2
SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, LAMB, PARTIAL_LAMB, COW_CLIP = range(7)


class UpdateSettings(NamedTuple):
    """What the stages of an update are told; each reads what it needs."""

    kind: int  # SGD to COW_CLIP
    rate: float
    decay: float
    eps: float
    dim: float  # of the whole row
    beta1: float
    beta2: float
    correction1: float  # 1 - beta1 ** updates
    correction2: float
    updates: float  # this one included
    clip: float  # of COW_CLIP
    shortest: float  # a row is taken to be at least as long


@compiled
def finish_sgd(
    held: Floats,  # rows in float32, updated: row ``rows[i]`` of the part is held[at[i]]
    at: Keys,  # [n]
    rows: Keys,  # [n]
    sums: Floats,  # [n, columns], gradients; may be overwritten
    first: Floats,  # [num_rows, columns or 1], the optimizer's first state
    second: Floats,  # its second one
    measured: Doubles,  # [n, MEASURES]
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowSGD`` says."""
    rate, decay = np.float32(settings.rate), np.float32(settings.decay)
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        for d in range(total.size):
            row[d] -= rate * (total[d] + decay * row[d])


@compiled
def measure_gradients(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Adds weight decay to the gradients, and measures the sum of their squares."""
    decay = np.float32(settings.decay)
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        if decay != 0:
            for d in range(total.size):
                total[d] += decay * row[d]
        measured[i, 0] = sum_of_squares(total)


@compiled
def finish_row_wise_adagrad(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, 1]
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowWiseAdagrad`` says, after ``measure_gradients``."""
    rate, eps = np.float32(settings.rate), np.float32(settings.eps)
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        state = first[rows[i], 0] + np.float32(measured[i, 0] / settings.dim)
        first[rows[i], 0] = state
        below = np.sqrt(state) + eps
        # Where all gradients were 0 so far nothing moves, also with eps = 0.
        step = np.float32(0) if below == 0 else rate / below
        for d in range(total.size):
            row[d] -= step * total[d]


@compiled
def finish_adagrad(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, columns]
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowAdagrad`` says."""
    rate, decay, eps = np.float32(settings.rate), np.float32(settings.decay), np.float32(settings.eps)
    zero = np.float32(0)
    for i in range(at.size):
        row, total, state = held[at[i]], sums[i], first[rows[i]]
        for d in range(total.size):
            g = total[d] + decay * row[d]
            squares = state[d] + g * g
            state[d] = squares
            below = np.sqrt(squares) + eps
            row[d] -= zero if below == zero else rate * g / below


@reordering
def sum_of_squares(vector: Floats) -> np.float32:
    """Sums a vector's squares, in any order."""
    total = np.float32(0)
    for d in range(vector.size):
        total += vector[d] * vector[d]
    return total

"""Adam, LAMB and CowClip, compiled by Numba: their stages, as in ``update_kernels``."""

from __future__ import annotations

import numpy as np

from embeddings.kernels.compiled import compiled
from embeddings.kernels.grouping_kernels import Doubles, Floats, Keys
from embeddings.kernels.update_kernels import GAP, IDS, UpdateSettings, sum_of_squares


@compiled
def finish_adam(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, columns]
    second: Floats,  # [num_rows, columns]
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowAdam`` says."""
    rate, decay = np.float32(settings.rate), np.float32(settings.decay)
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        _find_direction(total, first[rows[i]], second[rows[i]], settings)
        for d in range(total.size):
            row[d] -= rate * (total[d] + decay * row[d])


@compiled
def _find_direction(total: Floats, m: Floats, v: Floats, settings: UpdateSettings) -> None:
    # total: a row's gradient, overwritten by Adam's direction without weight decay
    beta1, beta2 = np.float32(settings.beta1), np.float32(settings.beta2)
    rest1, rest2 = np.float32(1 - settings.beta1), np.float32(1 - settings.beta2)
    enlarge1 = np.float32(1 / settings.correction1)
    enlarge2, eps = np.float32(1 / np.sqrt(settings.correction2)), np.float32(settings.eps)
    zero = np.float32(0)  # where all gradients were 0 so far nothing moves, also with eps = 0
    for d in range(total.size):
        g = total[d]
        first = beta1 * m[d] + rest1 * g
        second = beta2 * v[d] + rest2 * g * g
        m[d] = first
        v[d] = second
        below = enlarge2 * np.sqrt(second) + eps
        total[d] = zero if below == zero else enlarge1 * first / below


@compiled
def measure_directions(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, columns]
    second: Floats,  # [num_rows, columns]
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Turns gradients into the directions of ``RowLamb``, and measures ||w|| ** 2 and ||u|| ** 2."""
    for i in range(at.size):
        _find_direction(sums[i], first[rows[i]], second[rows[i]], settings)
        _add_decay(held[at[i]], sums[i], measured[i], np.float32(settings.decay))


@compiled
def _add_decay(row: Floats, total: Floats, measured: Doubles, decay: np.float32) -> None:
    # and measures both
    if decay != 0:
        for d in range(total.size):
            total[d] += decay * row[d]
    measured[0] = sum_of_squares(row)
    measured[1] = sum_of_squares(total)


@compiled
def measure_squares(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Measures the sum of the gradients' squares."""
    for i in range(at.size):
        measured[i, 0] = sum_of_squares(sums[i])


@compiled
def measure_partial_directions(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, columns]
    second: Floats,  # [num_rows, 1]
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Does as ``measure_directions`` for ``RowLamb(partial=True)``, after ``measure_squares``."""
    beta1, rest1 = np.float32(settings.beta1), np.float32(1 - settings.beta1)
    for i in range(at.size):
        total, m = sums[i], first[rows[i]]
        mean = measured[i, 0] / settings.dim
        v = np.float32(settings.beta2 * second[rows[i], 0] + (1 - settings.beta2) * mean)
        second[rows[i], 0] = v
        below = np.sqrt(v / settings.correction2) + settings.eps
        scale = np.float32(0) if below == 0 else np.float32(1 / (settings.correction1 * below))
        for d in range(total.size):
            moment = beta1 * m[d] + rest1 * total[d]
            m[d] = moment
            total[d] = scale * moment
        _add_decay(held[at[i]], total, measured[i], np.float32(settings.decay))


@compiled
def finish_lamb(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowLamb`` says, after their directions were found and measured."""
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        ratio = 1.0
        if measured[i, 0] > 0 and measured[i, 1] > 0:
            ratio = np.sqrt(measured[i, 0] / measured[i, 1])
        step = np.float32(settings.rate * ratio)
        for d in range(total.size):
            row[d] -= step * total[d]


@compiled
def take_gaps(rows: Keys, last: Floats, measured: Doubles, settings: UpdateSettings) -> None:
    """Tells ``measure_gradients_with_l2`` how many updates ago rows had their last one, and notes this one.

    Args:
        rows: [n].
        last: [num_rows, 1], the number of each row's last update; or empty, where every update is one of all rows.
        measured: [n, MEASURES], of which GAP is written.
        settings: Of this update.
    """
    for i in range(rows.size):
        measured[i, GAP] = 1.0
        if last.size:
            measured[i, GAP] = settings.updates - last[rows[i], 0]
            last[rows[i], 0] = np.float32(settings.updates)


@compiled
def measure_gradients_with_l2(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,
    second: Floats,
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Adds the gradient of ``RowCowClip``'s L2, once for each update of GAP; measures ||w|| ** 2 and ||g|| ** 2."""
    for i in range(at.size):
        _add_decay(held[at[i]], sums[i], measured[i], np.float32(settings.decay * measured[i, GAP]))


@compiled
def finish_cow_clip(
    held: Floats,
    at: Keys,
    rows: Keys,
    sums: Floats,
    first: Floats,  # [num_rows, columns]
    second: Floats,  # [num_rows, columns]
    measured: Doubles,
    settings: UpdateSettings,
) -> None:
    """Updates rows as ``RowCowClip`` says, after ``measure_gradients_with_l2``."""
    rate = np.float32(settings.rate)
    for i in range(at.size):
        row, total = held[at[i]], sums[i]
        most = settings.clip * measured[i, IDS] * max(np.sqrt(measured[i, 0]), settings.shortest)
        length = np.sqrt(measured[i, 1])
        if length > most:
            share = np.float32(most / length)
            for d in range(total.size):
                total[d] *= share
        _find_direction(total, first[rows[i]], second[rows[i]], settings)
        for d in range(total.size):
            row[d] -= rate * total[d]

"""The slow part of each history, compiled by Numba: projections on a handful of waves, without padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled
from embeddings.kernels.vectors import LANES, load, multiply_add, splat, store

Floats = NDArray[np.float32]


@compiled
def project_on_waves(
    x: Floats, waves: Floats, starts: NDArray[np.int64], dim: int, out: Floats, first: int, last: int
) -> None:
    """Writes the projection of histories `first` to `last`: W W^T x, with W the waves over the history's slots.

    Args:
        x: [S * dim].
        waves: [number of waves, longest history].
        starts: [B + 1], first slot of each history.
        dim: Of a vector.
        out: [S * dim], written.
        first: First history.
        last: History after the last one.
    """
    count = len(waves)
    amplitudes = np.empty(count * dim, np.float32)
    for history in range(first, last):
        start, length = starts[history], starts[history + 1] - starts[history]
        for c in range(0, dim, LANES):
            for wave in range(count):
                sums = splat(np.float32(0))
                for j in range(length):
                    sums = multiply_add(splat(waves[wave, j]), load(x, (start + j) * dim + c), sums)
                store(amplitudes, wave * dim + c, sums)
            for j in range(length):
                sums = splat(np.float32(0))
                for wave in range(count):
                    sums = multiply_add(splat(waves[wave, j]), load(amplitudes, wave * dim + c), sums)
                store(out, (start + j) * dim + c, sums)

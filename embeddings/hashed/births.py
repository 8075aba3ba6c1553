"""First values of rows that come into being one by one: those which ``initial_rows`` would give a whole table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embeddings.initial_rows import stream_key
from embeddings.kernels.birth_kernels import draw_rows
from embeddings.tables import TableConfig

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


class Births:
    """Draws rows of a table by their ids.

    Args:
        config: The table.
        seed: See ``initial_rows``.
    """

    def __init__(self, config: TableConfig, *, seed: int) -> None:
        self._dim = config.dim
        self._scale = np.float32(config.initial_scale)
        self._key = stream_key(config, seed)

    def draw(self, ids: Longs) -> Floats:
        """Gives the first values of rows: [n, dim]. A negative id stands for 2 ** 64 more."""
        if self._scale == 0:
            return np.zeros((ids.size, self._dim), np.float32)
        rows = np.empty((ids.size, self._dim), np.float32)
        draw_rows(ids, *self._key, self._scale, rows)
        return rows

"""A ranking written from its definition, in float64 and one user at a time, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Reference = Callable[..., tuple[int, int, list[int]]]


@pytest.fixture
def rank_by_sorting() -> Reference:
    """A function that returns (rank, ties, all items best first) of one user."""

    def rank(
        vector: NDArray[Any], items: NDArray[Any], target: int, seen: Sequence[int] = ()
    ) -> tuple[int, int, list[int]]:
        scores = items.astype(np.float64) @ vector.astype(np.float64)
        allowed = np.setdiff1d(np.arange(1, len(items)), [i for i in seen if i != target])
        order = allowed[np.lexsort((allowed, -scores[allowed]))]
        as_good = np.flatnonzero(scores[order] == scores[target])  # in one piece; the target is taken for its last
        return 1 + int(as_good[-1]), len(as_good) - 1, order.tolist()

    return rank

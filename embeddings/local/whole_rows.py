"""Rows of whole tables in this process, as tables ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.local.local_rows import Bags, LocalRows, whole_table
from embeddings.stopwatch import Stopwatch
from embeddings.tables import TableConfig


@dataclass(kw_only=True)
class Asked:
    """Bags, with tables as PART; a wrong id is found as they are looked up, in the same pass."""

    bags: Bags
    wrong: int = -1
    wrong_ranks: list[int] = field(default_factory=list)


class WholeRows:
    """``Rows`` that all lie in this process.

    Looking up and pooling is one pass over the ids; so is updating. Ids of one row are summed before it is updated,
    over all features of its table, in batch order: the result is the same for any number of threads.

    Args:
        configs: The tables.
        seed: See ``build_tables``.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int) -> None:
        self._held = LocalRows([whole_table(config) for config in configs], seed=seed)
        self._table_of = np.array([t for t, config in enumerate(configs) for _ in config.features], dtype=np.int64)

    def begin(self, asked: Bags, stopwatch: Stopwatch) -> Asked:
        """See ``Rows``."""
        segments = asked.segments.copy()
        segments[:, 0] = self._table_of
        return Asked(bags=replace(asked, segments=segments))

    def look_up(self, request: Asked, out: Tensor, stopwatch: Stopwatch) -> Bags:
        """See ``Rows``."""
        with stopwatch.stage("lookup"):
            request.wrong = self._held.look_up(request.bags, out)
        return request.bags

    def update(self, looked_up: Bags, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """See ``Rows``."""
        with stopwatch.stage("row update"):
            self._held.update(looked_up, gradient)

    def rows(self) -> Iterator[TableRows]:
        """See ``Rows``."""
        return self._held.rows()

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """See ``Tables``."""
        self._held.set_learning_rate_factors(factors)

    def set_eps_factor(self, factor: float) -> None:
        """See ``Tables``."""
        self._held.set_eps_factor(factor)

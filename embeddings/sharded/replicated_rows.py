"""Small tables that every rank holds all of: looked up where they are asked for, their gradients summed over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.local.local_rows import Bags, LocalRows, whole_table
from embeddings.tables import TableConfig


class ReplicatedRows:
    """Tables whose rows are the same on every rank, bit for bit.

    Args:
        configs: The tables.
        features: Of each table: its features' numbers.
        seed: See ``build_tables``.
        is_primary: Whether this rank saves them.
    """

    def __init__(
        self, configs: Sequence[TableConfig], features: Sequence[Sequence[int]], *, seed: int, is_primary: bool
    ) -> None:
        self._rows = LocalRows([whole_table(config)._replace(is_replicated=True) for config in configs], seed=seed)
        self._part_of = {feature: part for part, mine in enumerate(features) for feature in mine}
        self._is_primary = is_primary
        self._sizes = [config.num_rows * (config.dim + 1) for config in configs]
        self._sums = torch.zeros(0)

    @property
    def num_bytes(self) -> int:
        """Bytes that are summed over ranks in each update."""
        return 4 * sum(self._sizes)

    def look_up(self, asked: Bags, out: Tensor) -> None:
        """Pools the bags of these tables' features into ``out``; PART of ``asked`` are features."""
        if self._sizes:
            self._rows.look_up(self._own(asked), out)

    def begin_update(self, asked: Bags, gradient: Tensor) -> Any:
        """Begins to sum the gradients over ranks (a collective call); returns what to wait for."""
        if not self._sizes:
            return None
        self._sums = torch.zeros(sum(self._sizes))
        own = self._own(asked)
        for part, sums in enumerate(self._split()):
            self._rows.sum_gradients(part, own, gradient, sums)
        return dist.all_reduce(self._sums, async_op=True)

    def finish_update(self, work: Any) -> None:
        """Updates the rows that any rank touched, or all; ``work`` has been waited for."""
        if work is None:
            return
        for part, sums in enumerate(self._split()):
            self._rows.apply(part, sums)
        self._sums = torch.zeros(0)

    def rows(self) -> Iterator[TableRows]:
        """Gives each table's rows."""
        for rows in self._rows.rows():
            yield rows._replace(is_primary=self._is_primary)

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """See ``Tables``; of these tables only."""
        self._rows.set_learning_rate_factors(factors)

    def set_eps_factor(self, factor: float) -> None:
        """See ``Tables``; of these tables only."""
        self._rows.set_eps_factor(factor)

    def _split(self) -> list[Tensor]:
        dims = [part.config.dim for part in self._rows.parts]
        return [sums.view(-1, dim + 1) for sums, dim in zip(self._sums.split(self._sizes), dims, strict=True)]

    def _own(self, asked: Bags) -> Bags:
        segments = [
            (self._part_of[feature], *where) for feature, *where in asked.segments.tolist() if feature in self._part_of
        ]
        return replace(asked, segments=np.array(segments, dtype=np.int64).reshape(-1, 5))

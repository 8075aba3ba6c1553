"""Tables in this process's memory on the CPU, over our own row kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.local.local_rows import Bags, LocalRows, whole_table
from embeddings.tables import TableConfig


class LocalTables(Tables):
    """Whole tables on the CPU.

    Looking up and pooling is one pass over the ids; so is updating, inside backward. Ids of one row are summed before
    it is updated, over all features of its table, in batch order: the result is the same for any number of threads.

    Args:
        configs: The tables.
        seed: See ``build_tables``.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int = 0) -> None:
        super().__init__(configs)
        self._rows = LocalRows([whole_table(config) for config in configs], seed=seed)
        # Gives autograd a reason to call backward; the rows themselves never have a gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        self._columns = [sum(self.feature_dims[:f]) for f in range(len(self.feature_dims))]

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        batch = read_jagged(features, self.feature_names)
        if self.training and torch.is_grad_enabled():
            return self.keyed(_LookUp.apply(self._anchor, self, batch))  # type: ignore[no-untyped-call]
        return self.keyed(self._look_up(batch))

    @override
    def set_learning_rate_factor(self, factor: float) -> None:
        self._rows.set_learning_rate_factor(factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        return self._rows.rows()

    def _look_up(self, batch: Jagged) -> Tensor:
        pooled = torch.empty(batch.batch_size, sum(self.feature_dims))
        with self.stopwatch.stage("lookup"):
            wrong = self._rows.look_up(self._bags(batch), pooled)
        if wrong >= 0:
            key = batch.cell_of(wrong) // batch.batch_size
            raise self.id_error(batch, batch.positions.index(key), wrong)
        return pooled

    def _update(self, batch: Jagged, gradient: Tensor) -> None:
        with self.stopwatch.stage("row update"):
            self._rows.update(self._bags(batch), gradient)

    def _bags(self, batch: Jagged) -> Bags:
        segments = [
            (table, position * batch.batch_size, batch.batch_size, column, sum(self.feature_dims))
            for table, position, column in zip(self.feature_tables, batch.positions, self._columns, strict=True)
        ]
        cells = np.array(segments, dtype=np.int64)
        return Bags(ids=batch.ids, offsets=batch.offsets, weights=batch.weights, segments=cells)


class _LookUp(torch.autograd.Function):
    """Looks up in forward and updates the rows in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: LocalTables, batch: Jagged) -> Tensor:
        ctx.tables, ctx.batch = tables, batch
        return tables._look_up(batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.tables._update(ctx.batch, gradient.contiguous())
        return None, None, None

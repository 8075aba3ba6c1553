"""Tables in this process's memory on the CPU, over our own row kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings import kernels
from embeddings.initial_rows import initial_rows
from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from embeddings.threads import count_parts, run_all


class LocalTables(Tables):
    """Tables of float32 rows on the CPU.

    Looking up and pooling is one pass over the ids; so is updating, inside backward. Ids of one row are summed before
    it is updated, over all features of its table, in batch order: the result is the same for any number of threads.

    Args:
        configs: The tables.
        seed: See ``build_tables``.
    """

    def __init__(self, configs: Sequence[TableConfig], *, seed: int = 0) -> None:
        super().__init__(configs)
        for config in configs:
            if config.num_rows > 1 << 32:
                raise ValueError(f"table {config.name!r}: expected num_rows <= 2**32, got {config.num_rows}")
        self._weights = [initial_rows(config, seed=seed) for config in configs]
        self._sums_of_squares = [
            torch.zeros(0 if isinstance(config.optimizer, RowSGD) else config.num_rows) for config in configs
        ]
        self._learning_rate_factor = 1.0
        # Gives autograd a reason to call backward; the rows themselves never have a gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        self._columns = np.cumsum([0, *self.feature_dims])
        self._features = [[f for f, t in enumerate(self.feature_tables) if t == table] for table in range(len(configs))]

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        batch = read_jagged(features, self.feature_names)
        if self.training and torch.is_grad_enabled():
            return self.keyed(_LookUp.apply(self._anchor, self, batch))  # type: ignore[no-untyped-call]
        return self.keyed(self._look_up(batch))

    @override
    def set_learning_rate_factor(self, factor: float) -> None:
        self._learning_rate_factor = factor

    @override
    def rows(self) -> Iterator[TableRows]:
        for config, weight, state in zip(self.table_configs, self._weights, self._sums_of_squares, strict=True):
            yield TableRows(config, weight, {} if isinstance(config.optimizer, RowSGD) else {"sum_of_squares": state})

    def _look_up(self, batch: Jagged) -> Tensor:
        pooled = torch.empty(batch.batch_size, sum(self.feature_dims))
        ids, offsets, out = batch.ids.numpy(), batch.offsets.numpy(), pooled.numpy()
        features, calls = [], []
        for feature, parts in enumerate(count_parts(batch.ids_per_feature)):
            table = self.feature_tables[feature]
            weight, mean = self._weights[table].numpy(), self.table_configs[table].pooling == "mean"
            edges = [batch.batch_size * part // parts for part in range(parts + 1)]
            for first, last in itertools.pairwise(edges):
                bags = (batch.positions[feature], first, last)
                arguments = (weight, ids, offsets, *bags, mean, out, self._columns[feature])
                features.append(feature)
                calls.append(partial(kernels.look_up, *arguments))
        for feature, wrong in zip(features, run_all(calls), strict=True):
            if wrong >= 0:
                raise self.id_error(batch, feature, wrong)
        return pooled

    def _update(self, batch: Jagged, gradient: Tensor) -> None:
        ids, offsets, source = batch.ids.numpy(), batch.offsets.numpy(), gradient.numpy()
        work = [sum(batch.ids_per_feature[f] for f in features) for features in self._features]
        calls = []
        for table, parts in enumerate(count_parts(work)):
            features = self._features[table]
            positions = np.array([batch.positions[f] for f in features], dtype=np.int64)
            mean = self.table_configs[table].pooling == "mean"
            where = (ids, offsets, positions, self._columns[features], mean, source)
            calls += [self._update_call(table, (*where, part, parts)) for part in range(parts)]
        run_all(calls)

    def _update_call(self, table: int, where: tuple[Any, ...]) -> partial[None]:
        weight, optimizer = self._weights[table].numpy(), self.table_configs[table].optimizer
        rate = optimizer.learning_rate * self._learning_rate_factor
        arguments: tuple[Any, ...]
        if isinstance(optimizer, RowSGD):
            arguments = (weight, *where, rate, optimizer.weight_decay)
            return partial(kernels.update_rows_sgd, *arguments)
        state = self._sums_of_squares[table].numpy()
        arguments = (weight, state, *where, rate, optimizer.eps, optimizer.weight_decay)
        return partial(kernels.update_rows_row_wise_adagrad, *arguments)


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

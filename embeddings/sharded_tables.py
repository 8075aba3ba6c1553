"""Tables on the CPUs of several ranks: ids go to where the rows lie, pooled vectors come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.id_exchange import Request
from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.local_rows import Bags
from embeddings.sharded_rows import LookedUp, ShardedRows
from embeddings.shards import ShardingPlan
from embeddings.tables import TableConfig
from embeddings.vector_exchange import Exchange


@dataclass(frozen=True, kw_only=True, eq=False)
class _Begun:
    features: KeyedJaggedTensor
    batch: Jagged
    request: Request
    wrong: int  # the place of an id outside its table, or -1


class ShardedTables(Tables):
    """Tables of which this rank holds the shards that a plan gives it.

    Each rank looks up its own samples. Rows are updated inside backward with the sum of the gradients of all ranks, so
    each rank's loss is the sum over its samples divided by the *global* batch size. ``forward``, ``backward`` after it
    in training, and ``prefetch`` are collective calls: every rank makes them in the same order, with a batch of no
    samples where it has none left.

    Args:
        configs: The tables.
        plan: What lies on which rank of ``torch.distributed``'s default group.
        seed: See ``build_tables``.
        exchange: Type in which vectors and gradients travel, see ``VectorExchange``; ids are exact.

    Raises:
        ValueError: When the plan is not one of these tables, or of the running group.
    """

    def __init__(
        self, configs: Sequence[TableConfig], *, plan: ShardingPlan, seed: int = 0, exchange: Exchange = "fp32"
    ) -> None:
        super().__init__(configs)
        self.plan = plan
        self._rows = ShardedRows(self.table_configs, plan, seed=seed, exchange=exchange)
        # Gives autograd a reason to call backward; the rows themselves never have a gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        self._columns = [sum(self.feature_dims[:f]) for f in range(len(self.feature_dims))]
        self._begun: list[_Begun] = []

    @property
    def bytes_sent(self) -> dict[str, int]:
        """What has left this process so far, in bytes: "ids", "rows", "gradients" and optimizers' "sums".

        What a rank asks of itself does not count; an all-reduce counts what goes into it, once.
        """
        return self._rows.bytes_sent

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prefetch(self, features: KeyedJaggedTensor) -> None:
        self._begun.append(self._begin(features))

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        begun = next((begun for begun in self._begun if begun.features is features), None)
        if begun is None:
            begun = self._begin(features)
        else:
            self._begun.remove(begun)
        if begun.wrong >= 0:
            key = begun.batch.cell_of(begun.wrong) // begun.batch.batch_size
            raise self.id_error(begun.batch, begun.batch.positions.index(key), begun.wrong)
        if begun.request.wrong_ranks:
            ranks = ", ".join(map(str, begun.request.wrong_ranks))
            raise ValueError(f"batch: expected ids inside their tables on every rank, got others on rank {ranks}")
        if self.training and torch.is_grad_enabled():
            return self.keyed(_LookUp.apply(self._anchor, self, begun))  # type: ignore[no-untyped-call]
        return self.keyed(self._look_up(begun)[0])

    @override
    def set_learning_rate_factor(self, factor: float) -> None:
        self._rows.set_learning_rate_factor(factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        return self._rows.rows()

    def _begin(self, features: KeyedJaggedTensor) -> _Begun:
        batch = read_jagged(features, self.feature_names)
        segments = [
            (feature, position * batch.batch_size, batch.batch_size, column, sum(self.feature_dims))
            for feature, (position, column) in enumerate(zip(batch.positions, self._columns, strict=True))
        ]
        asked = Bags(
            ids=batch.ids,
            offsets=batch.offsets,
            weights=batch.weights,
            segments=np.array(segments, dtype=np.int64),
        )
        wrong = self._rows.find_outside(asked)
        request = self._rows.begin(asked, is_wrong=wrong >= 0, stopwatch=self.stopwatch)
        return _Begun(features=features, batch=batch, request=request, wrong=wrong)

    def _look_up(self, begun: _Begun) -> tuple[Tensor, LookedUp]:
        pooled = torch.empty(begun.batch.batch_size, sum(self.feature_dims))
        return pooled, self._rows.look_up(begun.request, pooled, self.stopwatch)

    def _update(self, looked_up: LookedUp, gradient: Tensor) -> None:
        self._rows.update(looked_up, gradient, self.stopwatch)


class _LookUp(torch.autograd.Function):
    """Looks up in forward and updates the rows in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: ShardedTables, begun: _Begun) -> Tensor:
        pooled, ctx.looked_up = tables._look_up(begun)
        ctx.tables = tables
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.tables._update(ctx.looked_up, gradient.contiguous())
        return None, None, None

"""Tables that ask for rows wherever they lie, in this process or on other ranks, and update them inside backward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from typing_extensions import override

from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.local.local_rows import Bags
from embeddings.stopwatch import Stopwatch
from embeddings.tables import OtherRanksIdError, TableConfig


class Request(Protocol):
    """Bags that have been asked for."""

    @property
    def wrong(self) -> int:
        """The place of an id outside its table, or -1; known once the bags have been looked up, if not before."""

    @property
    def wrong_ranks(self) -> list[int]:
        """The ranks whose bags have such an id and who have told the others; nothing can be looked up then."""


class Rows(Protocol):
    """Rows here or elsewhere. All ranks call the same methods in the same order; bags have features as PART."""

    def begin(self, asked: Bags, stopwatch: Stopwatch) -> Any:
        """Begins to ask, and returns a ``Request``."""

    def look_up(self, request: Any, out: Tensor, stopwatch: Stopwatch) -> Any:
        """Pools the bags of a request into ``out``; returns what ``update`` needs."""

    def update(self, looked_up: Any, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """Updates the rows of a look-up by the gradient of its ``out``."""

    def rows(self) -> Iterator[TableRows]:
        """Gives the live rows that this process holds, in the order of tables."""

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """See ``Tables``."""

    def set_eps_factor(self, factor: float) -> None:
        """See ``Tables``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A batch whose ids are on their way.

    Attributes:
        features: What was asked for.
        batch: The same, read.
        size: Numbers that come back.
        request: On its way.
    """

    features: KeyedJaggedTensor
    batch: Jagged
    size: int
    request: Request


class AskingTables(Tables):
    """Tables over ``Rows``.

    Args:
        configs: The tables.
        rows: Their rows.
    """

    def __init__(self, configs: Sequence[TableConfig], rows: Rows) -> None:
        super().__init__(configs)
        self._rows = rows
        # Gives autograd a reason to call backward; the rows themselves never have a gradient.
        self._anchor = torch.zeros((), requires_grad=True)
        self._begun: list[Begun] = []

    @abstractmethod
    def _ask(self, batch: Jagged) -> tuple[Bags, int]:
        """Returns the bags to look up, one segment per feature, in order, and how many numbers they come to."""

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prefetch(self, features: KeyedJaggedTensor) -> None:
        self._begun.append(self._begin(features))

    @override
    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        self.check_factors(factors)
        self._rows.set_learning_rate_factors(factors)

    @override
    def set_eps_factor(self, factor: float) -> None:
        self._rows.set_eps_factor(factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        return self._rows.rows()

    def _look_up(self, features: KeyedJaggedTensor) -> tuple[Jagged, Tensor]:
        """Returns the batch as read and the numbers asked for, flat; a collective call."""
        begun = self._take(features)
        self._check(begun)
        if self._is_trained():
            return begun.batch, _LookUp.apply(self._anchor, self, begun)  # type: ignore[no-untyped-call]
        return begun.batch, self._answer(begun)[0]

    def _is_trained(self) -> bool:
        """Says whether rows that are looked up now will be updated."""
        return self.training and torch.is_grad_enabled()

    def _take(self, features: KeyedJaggedTensor) -> Begun:
        """Returns what ``prefetch`` has begun with the same object, or begins it."""
        begun = next((begun for begun in self._begun if begun.features is features), None)
        if begun is None:
            return self._begin(features)
        self._begun.remove(begun)
        return begun

    def _begin(self, features: KeyedJaggedTensor) -> Begun:
        batch = read_jagged(features, self.feature_names)
        asked, size = self._ask(batch)
        return Begun(features=features, batch=batch, size=size, request=self._rows.begin(asked, self.stopwatch))

    def _answer(self, begun: Begun) -> tuple[Tensor, Any]:
        """Returns the numbers that a batch asks for, flat, and what the update of their rows needs."""
        out = torch.empty(begun.size)
        looked_up = self._rows.look_up(begun.request, out, self.stopwatch)
        self._check(begun)
        return out, looked_up

    def _check(self, begun: Begun) -> None:
        batch, wrong, wrong_ranks = begun.batch, begun.request.wrong, begun.request.wrong_ranks
        if wrong >= 0:
            key = batch.cell_of(wrong) // batch.batch_size
            error = self.id_error(batch, batch.positions.index(key), wrong)
            error.others_know = bool(wrong_ranks)
            raise error
        if wrong_ranks:
            ranks = ", ".join(map(str, wrong_ranks))
            raise OtherRanksIdError(f"batch: expected ids inside their tables on all ranks, got others on rank {ranks}")


class PooledTables(AskingTables):
    """Tables over ``Rows`` that give one vector per bag, side by side."""

    def __init__(self, configs: Sequence[TableConfig], rows: Rows) -> None:
        super().__init__(configs, rows)
        self._columns = [sum(self.feature_dims[:f]) for f in range(len(self.feature_dims))]

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        batch, pooled = self._look_up(features)
        return self.keyed(pooled.view(batch.batch_size, sum(self.feature_dims)))

    @override
    def _ask(self, batch: Jagged) -> tuple[Bags, int]:
        stride = sum(self.feature_dims)
        segments = [
            (feature, position * batch.batch_size, batch.batch_size, column, stride)
            for feature, (position, column) in enumerate(zip(batch.positions, self._columns, strict=True))
        ]
        cells = np.array(segments, dtype=np.int64)
        asked = Bags(ids=batch.ids, offsets=batch.offsets, weights=batch.weights, segments=cells)
        return asked, batch.batch_size * stride


class UnpooledTables(AskingTables):
    """The unpooled twin of ``PooledTables``, with the interface of torchrec's ``EmbeddingCollection``.

    Each id is a bag of its own, so that rows, their optimizers, plans and exchanges are those of pooled tables.
    Weights of a batch and a table's ``pooling`` have no meaning here.
    """

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Looks up: for each feature the vectors of its ids [num_ids, dim], bag after bag, and the bags' lengths.

        Otherwise as ``Tables.forward``.
        """
        batch, vectors = self._look_up(features)
        sizes = [count * dim for count, dim in zip(batch.ids_per_feature, self.feature_dims, strict=True)]
        lengths = features.lengths().view(len(features.keys()), batch.batch_size)
        return {
            name: JaggedTensor(values=values.view(-1, dim), lengths=lengths[position])
            for name, values, dim, position in zip(
                self.feature_names, vectors.split(sizes), self.feature_dims, batch.positions, strict=True
            )
        }

    @override
    def _ask(self, batch: Jagged) -> tuple[Bags, int]:
        segments, size = [], 0
        for feature, (position, count) in enumerate(zip(batch.positions, batch.ids_per_feature, strict=True)):
            first = int(batch.offsets[position * batch.batch_size])
            segments.append((feature, first, count, size, self.feature_dims[feature]))
            size += count * self.feature_dims[feature]
        cells = np.array(segments, dtype=np.int64)
        return Bags(ids=batch.ids, offsets=torch.arange(len(batch.ids) + 1), weights=None, segments=cells), size


class _LookUp(torch.autograd.Function):
    """Looks up in forward and updates the rows in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: AskingTables, begun: Begun) -> Tensor:
        ctx.tables = tables
        out, ctx.looked_up = tables._answer(begun)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.tables._rows.update(ctx.looked_up, gradient.contiguous(), ctx.tables.stopwatch)
        return None, None, None

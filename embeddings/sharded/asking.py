"""Tables that ask for rows wherever they lie: what pooled and unpooled ones have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from typing_extensions import override

from embeddings.interface import TableRows, Tables
from embeddings.jagged import Jagged, read_jagged
from embeddings.local.local_rows import Bags
from embeddings.stopwatch import Stopwatch
from embeddings.tables import OtherRanksIdError, TableConfig


class Request(Protocol):
    """Bags that have been asked for."""

    @property
    def wrong_ranks(self) -> list[int]:
        """The ranks that asked for an id outside its table; none of their bags can be looked up then."""


class Rows(Protocol):
    """Rows here or elsewhere. All ranks call the same methods in the same order; bags have features as PART.

    Attributes:
        over_ranks: Whether some of them lie on other ranks.
    """

    over_ranks: bool

    def find_outside(self, asked: Bags) -> int:
        """Returns -1, or the place in ``asked.ids`` of the first id outside its table."""

    def begin(self, asked: Bags, *, is_wrong: bool, stopwatch: Stopwatch) -> Any:
        """Begins to ask, and returns a ``Request``; ``is_wrong`` tells the other ranks that there is no answer."""

    def look_up(self, request: Any, out: Tensor, stopwatch: Stopwatch) -> Any:
        """Pools the bags of a request into ``out``, flat float32; returns what ``update`` needs."""

    def update(self, looked_up: Any, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """Updates the rows of a look-up by the gradient of its ``out``."""

    def rows(self) -> Iterator[TableRows]:
        """Gives the live rows that this process holds, in the order of tables."""

    def set_learning_rate_factor(self, factor: float) -> None:
        """See ``Tables``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """A batch whose ids are on their way.

    Attributes:
        features: What was asked for.
        batch: The same, read.
        size: Numbers that come back.
        request: On its way.
        wrong: The place of an id outside its table, or -1.
    """

    features: KeyedJaggedTensor
    batch: Jagged
    size: int
    request: Request
    wrong: int


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
    def set_learning_rate_factor(self, factor: float) -> None:
        self._rows.set_learning_rate_factor(factor)

    @override
    def rows(self) -> Iterator[TableRows]:
        return self._rows.rows()

    def _look_up(self, features: KeyedJaggedTensor) -> tuple[Jagged, Tensor]:
        """Returns the batch as read and the numbers asked for, flat; a collective call."""
        begun = next((begun for begun in self._begun if begun.features is features), None)
        if begun is None:
            begun = self._begin(features)
        else:
            self._begun.remove(begun)
        if begun.wrong >= 0:
            key = begun.batch.cell_of(begun.wrong) // begun.batch.batch_size
            error = self.id_error(begun.batch, begun.batch.positions.index(key), begun.wrong)
            error.others_know = True
            raise error
        if begun.request.wrong_ranks:
            ranks = ", ".join(map(str, begun.request.wrong_ranks))
            raise OtherRanksIdError(f"batch: expected ids inside their tables on all ranks, got others on rank {ranks}")
        if self.training and torch.is_grad_enabled():
            return begun.batch, _LookUp.apply(self._anchor, self, begun)  # type: ignore[no-untyped-call]
        out = torch.empty(begun.size)
        self._rows.look_up(begun.request, out, self.stopwatch)
        return begun.batch, out

    def _begin(self, features: KeyedJaggedTensor) -> Begun:
        batch = read_jagged(features, self.feature_names)
        asked, size = self._ask(batch)
        wrong = self._rows.find_outside(asked)
        request = self._rows.begin(asked, is_wrong=wrong >= 0, stopwatch=self.stopwatch)
        return Begun(features=features, batch=batch, size=size, request=request, wrong=wrong)


class _LookUp(torch.autograd.Function):
    """Looks up in forward and updates the rows in backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: AskingTables, begun: Begun) -> Tensor:
        out = torch.empty(begun.size)
        ctx.tables, ctx.looked_up = tables, tables._rows.look_up(begun.request, out, tables.stopwatch)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.tables._rows.update(ctx.looked_up, gradient.contiguous(), ctx.tables.stopwatch)
        return None, None, None

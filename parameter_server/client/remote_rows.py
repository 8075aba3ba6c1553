"""Rows that shards hold: pulled before they are looked up, and pushed to with the sum of their gradients.

What a batch does to tables in this process, it does here in the same arithmetic; only who applies the sums differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.kernels.exchange_kernels import find_outside
from embeddings.local.local_rows import Bags
from embeddings.row_optimizers import RowCowClip
from embeddings.stopwatch import Stopwatch
from embeddings.tables import UNBOUNDED
from embeddings.unique_rows import UniqueRows, find_unique_rows
from parameter_server.client.rows_client import LaneLease, Pulled, Push, RowsClient
from parameter_server.description import RunDescription
from parameter_server.wire import NO_COUNTS


class PushPlace(NamedTuple):
    """Where the pushes of one batch belong: its lane, held under a lease, and its number in that lane."""

    lease: LaneLease
    clock: int


@dataclass(kw_only=True, eq=False)
class RemoteRequest:
    """A batch, with tables as PART.

    Attributes:
        rows: Which rows it is about; none where an id is wrong.
        wrong: See ``Request``.
        wrong_ranks: Nobody else has a part in it.
        pulling: Its rows on their way: one for each table that has any, in their order.
        place: Of its pushes; None where none may be made.
    """

    rows: UniqueRows | None
    wrong: int = -1
    wrong_ranks: list[int] = field(default_factory=list)
    pulling: Future[list[Pulled]] | None = None
    place: PushPlace | None = None


@dataclass(kw_only=True, eq=False)
class LookedUp:
    """What the pushes of a batch need.

    Attributes:
        rows: Which rows it is about.
        place: Of its pushes; given up by the first of them, since a shard would skip a second one.
        versions: Of the rows that the gradients are computed from: by shard, of each table that has any.
    """

    rows: UniqueRows
    place: PushPlace | None
    versions: list[Mapping[int, int]]


class RemoteRows:
    """``Rows`` on shards.

    Args:
        description: Of the run; its tables are those that are looked up.
        client: Pulls and pushes.
        gate: Is called before the rows of each batch that is trained are looked up, and returns once this trainer may
            go on; None: at once.

    Once a push has failed, its error comes from everything that is asked of the rows until ``forget``: a shard that had
    applied a later push of the same lane would take the failed one, sent again, for a duplicate.
    """

    def __init__(
        self, description: RunDescription, client: RowsClient, *, gate: Callable[[], None] | None = None
    ) -> None:
        configs = description.tables
        self._client, self._gate, self._staleness = client, gate, description.staleness
        self._dims = [config.dim for config in configs]
        self._counts_ids = [isinstance(config.optimizer, RowCowClip) for config in configs]
        self._means = tuple(config.pooling == "mean" for config in configs)
        self._table_of = np.array([t for t, config in enumerate(configs) for _ in config.features], dtype=np.int64)
        self._num_rows = np.array([config.num_rows for config in configs for _ in config.features], dtype=np.int64)
        self._is_bounded = self._num_rows != UNBOUNDED
        self._factors: tuple[float, ...] = (1.0,) * len(configs)
        self._eps_factor = 1.0
        self._unacknowledged: deque[Future[None]] = deque()
        self._unpushed = 0  # batches that have been looked up in training and have not come back yet
        self._failure: BaseException | None = None
        self.last_push: Future[None] = Future()  # of a batch: done once all shards have acknowledged it
        self.last_push.set_result(None)

    def begin(self, asked: Bags, stopwatch: Stopwatch) -> RemoteRequest:
        """See ``Rows``; nothing is pulled before ``start``."""
        bounded = asked.segments[self._is_bounded]
        wrong = int(find_outside(asked.ids.numpy(), asked.offsets.numpy(), bounded, self._num_rows))
        if wrong >= 0:
            return RemoteRequest(rows=None, wrong=wrong)
        segments = asked.segments.copy()
        segments[:, 0] = self._table_of
        with stopwatch.stage("lookup"):
            return RemoteRequest(rows=find_unique_rows(replace(asked, segments=segments), self._means))

    def start(self, request: RemoteRequest, *, may_lag: bool) -> None:
        """Begins to pull a request's rows.

        Args:
            request: One whose ids are right.
            may_lag: Whether pushes may be under way meanwhile, as many as the run's staleness allows.
        """
        if request.pulling is not None or request.rows is None:
            return
        self._settle(self._allowed() if may_lag else 0)
        wanted = [(table, ids) for table, ids in enumerate(request.rows.ids) if ids.size]
        request.pulling = self._client.pull(wanted)

    def look_up(self, request: RemoteRequest, out: Tensor, stopwatch: Stopwatch) -> LookedUp:
        """See ``Rows``."""
        rows = request.rows
        assert rows is not None
        with stopwatch.stage("rows all-to-all"):
            self._settle(None)
            if request.place is not None and self._gate is not None:
                self._gate()
            self.start(request, may_lag=request.place is not None)
            assert request.pulling is not None
            pulled = request.pulling.result()
        with stopwatch.stage("lookup"):
            found = iter(pulled)
            arrays = [
                next(found).rows if ids.size else np.empty((0, dim), np.float32)
                for ids, dim in zip(rows.ids, self._dims, strict=True)
            ]
            rows.look_up(arrays, out)
        self._unpushed += request.place is not None
        return LookedUp(rows=rows, place=request.place, versions=[its.versions for its in pulled])

    def update(self, looked_up: LookedUp, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """Pushes the sums of a look-up's gradients; returns at once, but for staleness 0 once all is acknowledged."""
        place, looked_up.place = looked_up.place, None
        if place is None:
            raise ValueError(
                "update: expected one backward per look-up in training, got a second one: its push would be taken for "
                "a duplicate of the first one"
            )
        with stopwatch.stage("row update"):
            sums = looked_up.rows.sum_gradients(gradient, self._dims)
        with stopwatch.stage("gradients all-to-all"):
            self._settle(None)
            self._unpushed -= 1
            try:
                self.last_push = self._client.push(place.lease, place.clock, self._describe(looked_up, sums))
            except Exception as error:
                self._failure = error
                raise
            self._unacknowledged.append(self.last_push)
            if self._staleness == 0:
                self.drain()

    def drain(self) -> None:
        """Waits until every push so far is acknowledged."""
        self._settle(0)

    def forget(self) -> None:
        """Forgets batches that were looked up in training and will not come back, and pushes that have failed."""
        self._unpushed, self._failure = 0, None
        waiting = self._unacknowledged
        self._unacknowledged = deque(push for push in waiting if not push.done() or push.exception() is None)

    def rows(self) -> Iterator[TableRows]:
        """Gives nothing: this process holds no rows."""
        return iter(())

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """See ``Tables``."""
        self._factors = tuple(factors)

    def set_eps_factor(self, factor: float) -> None:
        """See ``Tables``."""
        self._eps_factor = factor

    def _describe(self, looked_up: LookedUp, sums: list[Any]) -> list[Push]:
        versions = iter(looked_up.versions)
        return [
            Push(
                table=table,
                ids=ids,
                gradients=sums[table],
                versions=next(versions),
                factor=self._factors[table],
                eps_factor=self._eps_factor,
                counts=looked_up.rows.count_ids(table) if self._counts_ids[table] else NO_COUNTS,
            )
            for table, ids in enumerate(looked_up.rows.ids)
            if ids.size
        ]

    def _allowed(self) -> int | None:
        """Says how many pushes may be unacknowledged when a pull begins; batches that are yet to be pushed count."""
        return None if self._staleness is None else max(0, self._staleness - self._unpushed)

    def _settle(self, allowed: int | None) -> None:
        """Waits until no more pushes than allowed are unacknowledged.

        Raises:
            The error of a push that has failed, now or before.
        """
        waiting = self._unacknowledged
        while waiting and self._failure is None:
            if not waiting[0].done() and (allowed is None or len(waiting) <= allowed):
                break
            try:
                waiting.popleft().result()
            except Exception as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure

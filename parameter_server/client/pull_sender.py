"""All pulls of a client: asked of each shard that holds some of the rows, and again where one does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.routing_kernels import scatter_rows
from parameter_server.client.damaged_answers import decode_answer
from parameter_server.client.frame_cutting import Order, pull_rows_per_frame, resplit
from parameter_server.client.retries import Patience, passes
from parameter_server.client.shard_connections import ShardConnections
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes
from parameter_server.wire import (
    DTYPES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_FRAMES,
    Flag,
    Header,
    Longs,
    Op,
    Type,
    encode,
    frame_bytes,
    join,
)


class Pulled(NamedTuple):
    """Rows as they came.

    Attributes:
        rows: [n, dim] float32, in the order of the ids that were asked for.
        versions: By shard, how often the table there had been changed.
    """

    rows: NDArray[np.float32]
    versions: dict[int, int]


class PullPart(NamedTuple):
    """Rows of one table that a frame asks for."""

    asked: int  # which of the tables that were asked for
    table: int
    ids: Longs
    places: Longs  # in the rows of that table


@dataclass(eq=False)
class PendingPull:
    """What one call asks for; done once no message is missing."""

    pulled: list[Pulled]
    done: Future[list[Pulled]] = field(default_factory=Future)
    missing: int = 0

    def fail(self, error: BaseException) -> None:
        """Gives the pull up."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class PullMessage:
    """Parts that are asked of one shard in one call."""

    shard: int
    parts: list[PullPart]
    pending: PendingPull
    patience: Patience


class PullSender:
    """Sends pulls; ``begin`` may be called on any thread, all else is on the loop's.

    Args:
        loop: Receives answers.
        routes: The first ones.
        connections: To shards.
        run_id: Of the run.
        salts: Of the tables.
        dims: Of the tables.
        kind: Of the values that travel.
        deadline_seconds: For how long a pull is tried again.
        ask_routes: Has newer routes asked for.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        routes: Routes,
        connections: ShardConnections,
        *,
        run_id: int,
        salts: Sequence[np.uint64],
        dims: Sequence[int],
        kind: Type,
        deadline_seconds: float,
        ask_routes: Callable[[], None],
    ) -> None:
        self._loop, self._connections, self._ask_routes = loop, connections, ask_routes
        self._order = Order(routes)
        self._run_id, self._salts, self._dims, self._kind = run_id, list(salts), list(dims), kind
        self._deadline_seconds = deadline_seconds
        self._pending: set[PendingPull] = set()
        self._closed: Exception | None = None

    @property
    def epoch(self) -> int:
        """Of the newest routes."""
        return self._order.routes.epoch

    def begin(self, wanted: Sequence[tuple[int, Longs]]) -> Future[list[Pulled]]:
        """Asks for rows: of each table its number and ids [n].

        Raises:
            Exception: What the sender was closed with.
        """
        order, by_shard = self._order, dict[int, list[PullPart]]()
        for asked, (table, ids) in enumerate(wanted):
            most = pull_rows_per_frame(self._dims[table], self._kind)
            for shard, places in order.split_places(ids, self._salts[table]):
                for first in range(0, len(places), most):
                    some = places[first : first + most]
                    by_shard.setdefault(shard, []).append(PullPart(asked, table, ids[some], some))
        rows = (np.empty((len(ids), self._dims[table]), np.float32) for table, ids in wanted)
        pending = PendingPull([Pulled(its, {}) for its in rows])
        messages = self._gather(by_shard, pending)
        pending.missing = len(messages)
        if not messages:
            pending.done.set_result(pending.pulled)
        self._pending.add(pending)
        pending.done.add_done_callback(lambda done: self._pending.discard(pending))
        if self._closed is not None:  # not looked at before `close` can see the pull: nobody would answer it
            raise self._closed
        for message in messages:
            self._send(message)
        return pending.done

    def learn(self, routes: Routes) -> None:
        """Takes over newer routes."""
        if routes.epoch > self._order.routes.epoch:
            self._order = Order(routes)

    def close(self, error: Exception) -> None:
        """Gives up what has not come, and all that would be asked for later."""
        self._closed = error
        for pending in list(self._pending):
            pending.fail(error)

    def _gather(
        self, by_shard: dict[int, list[PullPart]], pending: PendingPull, patience: Patience | None = None
    ) -> list[PullMessage]:
        return [
            PullMessage(shard, some, pending, patience or Patience(self._deadline_seconds))
            for shard, parts in by_shard.items()
            for some in self._batch(parts)
        ]

    def _batch(self, parts: Sequence[PullPart]) -> Iterator[list[PullPart]]:
        """Gives as many parts at a time as fit into a message and its answer."""
        some: list[PullPart] = []
        asked = answered = 0
        for part in parts:
            n, dim = len(part.ids), self._dims[part.table]
            asks = frame_bytes(n, dim, self._kind, has_ids=True, has_values=False)
            answers = frame_bytes(n, dim, self._kind, has_ids=False, has_values=True)
            is_full = max(asked + asks, answered + answers) > MAX_FRAME_BYTES or len(some) == MAX_MESSAGE_FRAMES
            if some and is_full:
                yield some
                some, asked, answered = [], 0, 0
            some.append(part)
            asked, answered = asked + asks, answered + answers
        if some:
            yield some

    def _send(self, message: PullMessage) -> None:
        routes = self._order.routes
        frames = [
            encode(
                Header(
                    op=Op.PULL,
                    run_id=self._run_id,
                    table=part.table,
                    route_epoch=routes.epoch,
                    dim=self._dims[part.table],
                    type=self._kind,
                ),
                part.ids,
            )
            for part in message.parts
        ]
        try:
            if (address := routes.addresses.get(message.shard)) is None:
                gone = f"shard {message.shard} is no more"
                raise RefusedError(Refusal.FAILED_PRECONDITION, gone, moved=True)
            sent = self._connections.to(address).pull(join(frames))
        except Exception as error:
            sent = Future()
            sent.set_exception(error)
        sent.add_done_callback(lambda sent: self._hand_over(message, sent))

    def _hand_over(self, message: PullMessage, sent: Future[bytes]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._finish, message, sent)

    def _finish(self, message: PullMessage, sent: Future[bytes]) -> None:
        pending = message.pending
        if pending.done.done():
            return
        try:
            self._take(message, sent.result())
        except Exception as error:
            try:
                self._try_again(message, error)
            except Exception as final:
                pending.fail(final)
            return
        pending.missing -= 1
        if not pending.missing:
            pending.done.set_result(pending.pulled)

    def _take(self, message: PullMessage, answer: bytes) -> None:
        frames = decode_answer(answer)
        if len(frames) != len(message.parts):
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"expected {len(message.parts)} frames, got {len(frames)}")
        for part, frame in zip(message.parts, frames, strict=True):
            head, shape = frame.header, (len(part.ids), self._dims[part.table])
            is_right = head.op == Op.PULL and head.flags & Flag.REPLY and head.table == part.table
            if not is_right or frame.values.shape != shape or frame.values.dtype != DTYPES[self._kind]:
                raise RefusedError(
                    Refusal.INVALID_ARGUMENT, f"expected {shape} values of table {part.table}, got {head}"
                )
            rows, versions = message.pending.pulled[part.asked]
            values = frame.values.view(np.int16) if frame.values.itemsize == 2 else frame.values
            scatter_rows(values, part.places, rows)
            versions[message.shard] = min(head.version, versions.get(message.shard, head.version))

    def _try_again(self, message: PullMessage, error: Exception) -> None:
        """Asks later again, of the shards that hold the rows by then.

        Raises:
            Exception: There is no use in it.
        """
        if self._closed is not None or not passes(error):
            raise error
        address = self._order.routes.addresses.get(message.shard, "no address")
        delay = message.patience.fail(f"shard {message.shard} at {address}, pull", error)
        self._ask_routes()
        self._loop.call_later(delay, self._resend, message)

    def _resend(self, message: PullMessage) -> None:
        owners, by_shard = self._order.routes.owners, dict[int, list[PullPart]]()
        for part in message.parts:
            for shard, theirs in resplit(part.ids, self._salts[part.table], owners):
                some = part._replace(ids=part.ids[theirs], places=part.places[theirs])
                by_shard.setdefault(shard, []).append(some)
        messages = self._gather(by_shard, message.pending, message.patience)
        message.pending.missing += len(messages) - 1
        for again in messages:
            self._send(again)

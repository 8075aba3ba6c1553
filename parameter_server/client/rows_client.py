"""A client of all shards: rows are pulled from and pushed to wherever they lie, and each push is applied once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import numpy as np

from parameter_server.client.frame_cutting import Order, Piece, Push, cut_piece
from parameter_server.client.pull_sender import Pulled, PullSender
from parameter_server.client.push_sender import PushSender
from parameter_server.client.push_streams import LaneLease, PendingPush
from parameter_server.client.shard_connections import RoutesSource, RoutesWatch, ShardConnections
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost
from parameter_server.partition import Routes, salt_of
from parameter_server.transports import ShardConnection
from parameter_server.wire import DTYPES, Header, Longs, Op, Type

__all__ = ["LaneLease", "Pulled", "Push", "RoutesSource", "RowsClient", "ValueType"]

ValueType = Literal["fp32", "fp16"]
_TYPES = {"fp32": Type.FP32, "fp16": Type.FP16}
_DEADLINE_SECONDS = 300.0


class RowsClient:
    """Pulls and pushes rows; its methods may be called from several threads.

    A push is sent again with the same number until it is acknowledged, through restarts of shards and moves of buckets.
    One that cannot go on takes its whole lane with it: no later push of that lane and lease is sent.

    Args:
        description: Of the run.
        routes_source: Knows which shard holds which bucket.
        connect: Opens a connection to an address of the routes.
        value_type: Of rows and gradients as they travel; rows come out as float32.
        max_in_flight: Pushes that may be unacknowledged before ``push`` waits; and, for each lane and shard, messages
            under way at a time.
        deadline_seconds: For how long a shard may fail to answer before pulls and lanes are given up.
    """

    def __init__(
        self,
        description: RunDescription,
        routes_source: RoutesSource,
        connect: Callable[[str], ShardConnection],
        *,
        value_type: ValueType = "fp32",
        max_in_flight: int = 4,
        deadline_seconds: float = _DEADLINE_SECONDS,
    ) -> None:
        if value_type not in _TYPES:
            raise ValueError(f"value_type: expected 'fp32' or 'fp16', got {value_type!r}")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight: expected at least 1, got {max_in_flight}")
        self._description, self._kind, self._max_in_flight = description, _TYPES[value_type], max_in_flight
        self._names = [table.name for table in description.tables]
        self._salts = [salt_of(name) for name in self._names]
        self._dims = [table.dim for table in description.tables]
        self._latest: dict[int, tuple[int, int, int]] = {}  # of each lane: lease, clock, table
        self._changed = threading.Condition()
        self._pending: set[PendingPush] = set()
        self._error: BaseException | None = None
        self._is_closed = False
        routes = routes_source.current()
        self._loop = asyncio.new_event_loop()
        self._connections = ShardConnections(connect)
        self._watch = RoutesWatch(routes_source, self._learn)
        self._pulls = PullSender(
            self._loop,
            routes,
            self._connections,
            run_id=description.run_id,
            salts=self._salts,
            dims=self._dims,
            kind=self._kind,
            deadline_seconds=deadline_seconds,
            ask_routes=lambda: self._watch.ask(self._pulls.epoch),
        )
        self._pushes = PushSender(
            self._loop,
            routes,
            self._connections,
            self._salts,
            window=max_in_flight,
            deadline_seconds=deadline_seconds,
            keeps_pushes=description.durability == "journal",
            ask_routes=lambda: self._watch.ask(self._pushes.epoch),
        )
        self._loop.set_exception_handler(self._fail_all)
        self._thread = threading.Thread(target=self._loop.run_forever, name="rows-client", daemon=True)
        self._thread.start()

    @property
    def unacknowledged(self) -> int:
        """How many pushes are not acknowledged."""
        return len(self._pending)

    def pull(self, wanted: Sequence[tuple[int, Longs]]) -> Future[list[Pulled]]:
        """Asks for rows.

        Args:
            wanted: Numbers of tables, and ids [n] of each; ids may come twice.

        Returns:
            Rows [n, dim] of each, in the order of ids, and the versions that they are of. Fails with RefusedError,
            ConnectionLost or ShardUnreachableError.

        Raises:
            ConnectionLost: The client is closed.
        """
        return self._pulls.begin(wanted)

    def push(self, lane: LaneLease, clock: int, given: Sequence[Push]) -> Future[None]:
        """Sends gradients; waits while too many pushes are unacknowledged. Arrays may be changed afterwards.

        Each shard hears of each clock, if only by an empty frame: its tables' numbers of updates follow from clocks.

        Args:
            lane: Whose push it is.
            clock: Number of the lane's batch, from 1; what a shard has applied of it is never applied again.
            given: Gradients by table, each table once per clock, and tables in ascending order.

        Returns:
            Done once every shard has acknowledged. Fails with RefusedError, LaneLostError, ConnectionLost or
            ShardUnreachableError; then no later push of this lane and lease is sent.

        Raises:
            ValueError: An id comes twice, a gradient is not finite, or clocks or tables go backwards: nothing is sent.
        """
        order = self._pushes.order
        pieces: list[Piece] = []
        for push in given:
            for piece in order.split(push, self._names[push.table], self._salts[push.table], self._kind):
                head = piece.header._replace(
                    run_id=self._description.run_id, lane=lane.lane, lease=lane.lease, clock=clock
                )
                pieces += cut_piece(piece._replace(header=head))
        pieces += self._tell_others(order, lane, clock, pieces, given[0].table if given else 0)
        pending = PendingPush()
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._pending) < self._max_in_flight)
            if self._is_closed:
                raise ConnectionLost("push: the client is closed")
            self._check_order(lane, clock, [push.table for push in given])
            self._pending.add(pending)
            self._loop.call_soon_threadsafe(self._pushes.submit, lane, pieces, order, pending)
        pending.done.add_done_callback(partial(self._finish, pending))
        return pending.done

    def wait(self) -> None:
        """Waits until every push is acknowledged.

        Raises:
            Exception: The first error of a push since the last ``wait``.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Gives up what has not been answered, and ends the client's threads."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        self._watch.close()
        asyncio.run_coroutine_threadsafe(self._give_up(), self._loop).result()
        self._connections.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _tell_others(
        self, order: Order, lane: LaneLease, clock: int, pieces: Sequence[Piece], table: int
    ) -> list[Piece]:
        """Makes pieces without rows for the shards that have no part in a push."""
        told = {piece.shard for piece in pieces}
        head = Header(
            op=Op.PUSH,
            run_id=self._description.run_id,
            lane=lane.lane,
            lease=lane.lease,
            clock=clock,
            table=table,
            route_epoch=order.routes.epoch,
        )
        none = np.empty(0, np.int64), np.empty((0, self._dims[table]), DTYPES[self._kind]), np.empty(0, np.uint16)
        return [Piece(shard, head, *none) for shard in order.shards.tolist() if shard not in told]

    async def _give_up(self) -> None:
        closed = ConnectionLost("the client was closed before it was answered")
        self._pulls.close(closed)
        self._pushes.close(closed)

    def _fail_all(self, loop: asyncio.AbstractEventLoop, facts: dict[str, Any]) -> None:
        """Hands on what must not happen: whoever waits for a future would wait for ever."""
        error = facts.get("exception") or RuntimeError(facts["message"])
        self._pulls.close(error)
        self._pushes.close(error)

    def _check_order(self, lane: LaneLease, clock: int, tables: Sequence[int]) -> None:
        lease, last_clock, last_table = self._latest.get(lane.lane, (lane.lease, 0, -1))
        if lane.lease < lease:
            raise ValueError(f"push: expected lease {lease} of lane {lane.lane} or a later one, got {lane.lease}")
        last = (last_clock, last_table) if lane.lease == lease else (0, -1)
        for table in tables:
            if (clock, table) <= last:
                raise ValueError(
                    f"push of lane {lane.lane}: expected a clock and table above {last}, got {(clock, table)}; a shard "
                    "would skip it"
                )
            last = (clock, table)
        self._latest[lane.lane] = (lane.lease, *last)

    def _finish(self, pending: PendingPush, done: Future[None]) -> None:
        with self._changed:
            self._pending.discard(pending)
            if not done.cancelled() and self._error is None:
                self._error = done.exception()
            self._changed.notify_all()

    def _learn(self, routes: Routes) -> None:
        self._loop.call_soon_threadsafe(self._learn_on_loop, routes)

    def _learn_on_loop(self, routes: Routes) -> None:
        self._pulls.learn(routes)
        self._pushes.learn(routes)

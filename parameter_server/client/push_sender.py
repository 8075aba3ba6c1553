"""All pushes of a client: streams by lane and shard, and their change to newer routes at a moment when all is quiet.

A row's pushes must reach its bucket in the order of clocks, as a bucket skips what is not above its mark. So all
streams follow the same routes at any time; newer ones are taken over once nothing is under way, and what is not
acknowledged is split anew, in order. What was applied before its bucket moved is known there by the bucket's marks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from parameter_server.client.frame_cutting import Order, Piece, resplit
from parameter_server.client.push_streams import LaneLease, PendingPush, PushStream, QueuedFrame
from parameter_server.client.shard_connections import ShardConnections
from parameter_server.partition import Routes


class PushSender:
    """Owns the streams; all methods are called on the loop's thread.

    Args:
        loop: Runs it.
        routes: The first ones.
        connections: To shards.
        salts: Of the tables.
        window: Messages under way per lane and shard.
        deadline_seconds: For how long a push is tried again.
        keeps_pushes: Whether the run promises that nothing acknowledged is lost.
        ask_routes: Has newer routes asked for.

    Attributes:
        order: Of the routes that pushes follow; may be read on any thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        routes: Routes,
        connections: ShardConnections,
        salts: Sequence[np.uint64],
        *,
        window: int,
        deadline_seconds: float,
        keeps_pushes: bool,
        ask_routes: Callable[[], None],
    ) -> None:
        self.loop, self.window, self.deadline_seconds = loop, window, deadline_seconds
        self.keeps_pushes, self.ask_routes = keeps_pushes, ask_routes
        self.order = Order(routes)
        self._connections, self._salts = connections, list(salts)
        self._next: Routes | None = None
        self._streams: dict[LaneLease, dict[int, PushStream]] = {}
        self._failed: dict[LaneLease, Exception] = {}
        self._error: Exception | None = None
        self._under_way = 0

    @property
    def epoch(self) -> int:
        """Of the newest routes that are known."""
        return (self._next or self.order.routes).epoch

    @property
    def is_paused(self) -> bool:
        """Whether newer routes wait for what is under way."""
        return self._next is not None

    def submit(self, lane: LaneLease, pieces: Sequence[Piece], order: Order, pending: PendingPush) -> None:
        """Sends a push, after what its lane has pushed before.

        Args:
            lane: Whose push it is.
            pieces: As ``order`` has split them, each short enough for a frame.
            order: If not the newest, pieces are split anew.
            pending: Is done with them.
        """
        if error := self._error or self._failed.get(lane):
            pending.fail(error)
            return
        self._forget_earlier(lane)
        frames = [QueuedFrame(p.shard, p.header, p.ids, p.values, p.counts, pending) for p in pieces]
        if order is not self.order:
            frames = [part for frame in frames for part in self._split(frame)]
        pending.frames = len(frames)
        if not frames:
            pending.done.set_result(None)
        self._queue(lane, frames)

    def learn(self, routes: Routes) -> None:
        """Takes over newer routes, as soon as nothing is under way."""
        newest = self._next or self.order.routes
        if routes.epoch > newest.epoch:
            self._next = routes
            self._try_change()

    def send(self, shard: int, message: bytes, finish: Callable[[Future[bytes]], None]) -> None:
        """See ``StreamOwner``."""
        self._under_way += 1
        try:
            sent = self._connections.to(self.order.routes.addresses[shard]).push(message)
        except Exception as error:
            sent = Future()
            sent.set_exception(error)
        sent.add_done_callback(lambda sent: _call_on(self.loop, finish, sent))

    def place_of(self, shard: int) -> str:
        """See ``StreamOwner``."""
        return f"shard {shard} at {self.order.routes.addresses.get(shard, 'no address')}"

    def fail_lane(self, lane: LaneLease, error: Exception) -> None:
        """See ``StreamOwner``."""
        self._failed[lane] = error
        for stream in self._streams.pop(lane, {}).values():
            stream.close(error)

    def quieten(self) -> None:
        """See ``StreamOwner``."""
        self._under_way -= 1
        self._try_change()

    def close(self, error: Exception) -> None:
        """Gives up what is not acknowledged, and all that would come later."""
        self._error = error
        for lane in list(self._streams):
            self.fail_lane(lane, error)

    def _queue(self, lane: LaneLease, frames: Sequence[QueuedFrame]) -> None:
        streams = self._streams.setdefault(lane, {})
        for frame in frames:
            if frame.shard not in streams:
                streams[frame.shard] = PushStream(lane, frame.shard, self)
            streams[frame.shard].add(frame)
        for shard in dict.fromkeys(frame.shard for frame in frames):
            if shard in streams:  # the lane may have failed at the first
                streams[shard].send()

    def _split(self, frame: QueuedFrame) -> list[QueuedFrame]:
        routes = self.order.routes
        frame.header = frame.header._replace(route_epoch=routes.epoch)
        parts = resplit(frame.ids, self._salts[frame.header.table], routes.owners)
        return [frame.part(shard, theirs) for shard, theirs in parts]

    def _try_change(self) -> None:
        if self._next is None or self._under_way:
            return
        self.order, self._next = Order(self._next), None
        routes = self.order.routes
        for lane, streams in list(self._streams.items()):
            moved: list[QueuedFrame] = []
            for shard, stream in list(streams.items()):
                moved += stream.take_moved(routes, self._salts)
                if shard not in routes.addresses:
                    stream.close()  # all of its rows lie elsewhere
                    del streams[shard]
            # a bucket's rows come from one stream, and stay in their order
            self._queue(lane, sorted(moved, key=lambda frame: (frame.header.clock, frame.header.table)))
            for stream in list(self._streams.get(lane, {}).values()):
                stream.resume()
                stream.send()
        self._connections.keep(routes)

    def _forget_earlier(self, lane: LaneLease) -> None:
        """Ends the streams of the lane's earlier leases that have nothing left to send."""
        for known in [known for known in self._streams if known.lane == lane.lane and known.lease < lane.lease]:
            if not any(stream.frames for stream in self._streams[known].values()):
                del self._streams[known]
        for known in [known for known in self._failed if known.lane == lane.lane and known.lease < lane.lease]:
            del self._failed[known]


def _call_on(loop: asyncio.AbstractEventLoop, finish: Callable[[Future[bytes]], None], sent: Future[bytes]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(finish, sent)

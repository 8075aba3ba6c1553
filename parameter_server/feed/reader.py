"""The reader's side of the serving feed: follows all shards, and keeps a copy of their rows that is little behind."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.client.shard_connections import RoutesSource
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.feed.messages import FeedConnection, FeedRequest, Floats, Longs, Mark, Mask, mark_of, pack_buckets
from parameter_server.partition import Routes, buckets_of, salt_of
from parameter_server.wire import Frame, Op, decode

_RETRY_SECONDS = 0.2

log = logging.getLogger(__name__)


class RowsTarget(Protocol):
    """What a reader keeps its rows in; it is called by one thread at a time."""

    def put(self, table: int, ids: Longs, weights: Floats) -> None:
        """Adds rows or replaces them: [n] and [n, dim]."""

    def drop(self, table: int, ids: Longs) -> None:
        """Removes rows; those that are not there are left out."""

    def held(self, table: int) -> Longs:
        """Gives the ids of all rows of a table."""


@dataclass
class _Part:
    """What the reader knows of one shard."""

    number: int
    num_tables: int
    history: int = 0
    route_epoch: int = 0  # of the shard's last pass
    since: list[int] = field(init=False)
    whole: list[Mask] = field(init=False)
    moments: list[float] = field(init=False)
    coming: Mask | None = None  # buckets that are being told whole
    told: list[Longs] = field(default_factory=list)  # ids of their rows so far
    offset: float = math.inf  # between the shard's clock and ours, and the shortest way of a message
    connection: FeedConnection | None = None
    thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.begin(0)
        self.moments = [-math.inf] * self.num_tables

    def begin(self, history: int) -> None:
        """Forgets which versions the rows are of."""
        self.history = history
        self.since = [0] * self.num_tables
        self.whole = [np.zeros(NUM_BUCKETS, np.bool_) for _ in range(self.num_tables)]


class FeedReader:
    """Follows all shards of a run, each in a thread, until closed.

    A shard that cannot be reached is asked again and again, and goes on where it was cut off; its rows meanwhile stay
    as they are and ``delay_seconds`` grows. Rows of a bucket that moves are read whole from the shard it moves to. A
    process that lasts calls ``embeddings.allocation.share_free_memory`` first: there are as many threads as shards.

    Args:
        description: Of the run.
        routes: Where buckets lie.
        connect: Opens a connection to the shard at an address.
        target: What rows are put into.
        seconds: Between passes of a shard over its changes; a little more than this is how far behind the reader is.
    """

    def __init__(
        self,
        description: RunDescription,
        routes: RoutesSource,
        connect: Callable[[str], FeedConnection],
        target: RowsTarget,
        *,
        seconds: float = 0.25,
    ) -> None:
        self._description, self._source, self._connect, self._target = description, routes, connect, target
        self._seconds = seconds
        self._salts = [salt_of(table.name) for table in description.tables]
        self._parts: dict[int, _Part] = {}
        self._lock = threading.RLock()
        self._is_over = threading.Event()
        self._routes = routes.current()
        self._follow_all()

    @property
    def delay_seconds(self) -> float:
        """How far the rows are behind the shards: all pushes applied longer ago are in; infinite until all were read.

        Shards' and reader's clocks may differ: what a message took at least, since its connection was opened, is left
        out.
        """
        with self._lock:
            return time.monotonic() - self._moment()

    def versions(self, shard: int) -> tuple[int, ...]:
        """Gives the versions of a shard's tables that the rows are of."""
        with self._lock:
            part = self._parts.get(shard)
            return tuple(part.since) if part else (0,) * len(self._salts)

    def wait(self, delay_seconds: float, timeout_seconds: float) -> bool:
        """Waits until the rows are at most so far behind; says whether they are."""
        end = time.monotonic() + timeout_seconds
        while self.delay_seconds > delay_seconds:
            if time.monotonic() > end or self._is_over.wait(min(0.02, self._seconds)):
                return False
        return True

    def close(self) -> None:
        """Ends all threads; the rows stay."""
        self._is_over.set()
        with self._lock:
            parts = list(self._parts.values())
            for part in parts:
                if part.connection is not None:
                    part.connection.close()
        for part in parts:
            if part.thread is not None:
                part.thread.join()

    def __enter__(self) -> FeedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow_all(self) -> None:
        with self._lock:
            for number in self._routes.addresses:
                part = self._parts.setdefault(number, _Part(number, len(self._salts)))
                if part.thread is None and not self._is_over.is_set():
                    part.thread = threading.Thread(
                        target=self._follow, args=(part,), name=f"feed-of-shard-{number}", daemon=True
                    )
                    part.thread.start()

    def _follow(self, part: _Part) -> None:
        while not self._is_over.is_set():
            try:
                self._follow_once(part)
            except (RefusedError, ConnectionLost) as error:
                log.warning("feed of shard %d: %s", part.number, error)
                if isinstance(error, RefusedError) and error.refusal is Refusal.INVALID_ARGUMENT:
                    part.begin(0)
            except Exception:
                # Of the target, or of the program: rows would grow old silently if the thread ended.
                log.exception("feed of shard %d", part.number)
            if self._is_over.wait(_RETRY_SECONDS):
                return
            self._learn(self._source.current())
            with self._lock:
                if part.number not in self._routes.addresses:
                    part.thread = None
                    return

    def _follow_once(self, part: _Part) -> None:
        with self._lock:
            address = self._routes.addresses.get(part.number)
        if address is None:  # drained meanwhile
            return
        connection = self._connect(address)
        try:
            with self._lock:
                if self._is_over.is_set():
                    return
                part.connection, part.coming, part.offset = connection, None, math.inf
                request = FeedRequest(
                    run_id=self._description.run_id,
                    history=part.history,
                    route_epoch=part.route_epoch,
                    since=tuple(part.since),
                    whole=pack_buckets(np.logical_and.reduce(part.whole)),
                    seconds=self._seconds,
                )
            for message in connection.follow(request.encode()):
                for frame in decode(message):
                    self._take(part, frame)
        finally:
            connection.close()

    def _take(self, part: _Part, frame: Frame) -> None:
        header = frame.header
        if header.run_id != self._description.run_id or header.table >= len(self._salts):
            raise RefusedError(Refusal.INVALID_ARGUMENT, "feed: expected a frame of this run and its tables")
        if header.route_epoch > self._routes.epoch:
            self._learn(self._source.newer_than(header.route_epoch - 1))
            if header.route_epoch > self._routes.epoch:
                raise RefusedError(Refusal.UNAVAILABLE, f"feed: no routes of epoch {header.route_epoch} so far")
        with self._lock:  # what another shard tells must not come between the look at the routes and the rows
            if header.seq != part.history:
                part.begin(header.seq)
            mark = mark_of(header)
            if mark is Mark.WHOLE:
                self._begin_buckets(part, header.table, frame.ids)
            elif mark is Mark.END:
                self._end_pass(part, frame)
            else:
                self._put_rows(part, frame)

    def _put_rows(self, part: _Part, frame: Frame) -> None:
        table = frame.header.table
        mine = self._routes.owners[buckets_of(frame.ids, self._salts[table])] == part.number
        ids = frame.ids if mine.all() else frame.ids[mine]
        if frame.header.op == Op.EVICTED:
            self._target.drop(table, ids)
            return
        dim = self._description.tables[table].dim
        if frame.values.shape != (frame.ids.size, dim) or frame.values.dtype != np.float32:
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"feed: expected rows of {dim} fp32 numbers")
        self._target.put(table, ids, frame.values if mine.all() else frame.values[mine])
        if part.coming is not None:
            part.told.append(ids)

    def _begin_buckets(self, part: _Part, table: int, buckets: Longs) -> None:
        """Drops what was not told of the buckets before, and begins with others."""
        mine = self._routes.owned_by(part.number)
        if part.coming is not None:
            done = part.coming & mine
            held = self._target.held(table)
            held = held[done[buckets_of(held, self._salts[table])]]
            gone = np.setdiff1d(held, np.concatenate([*part.told, held[:0]]))
            if gone.size:
                self._target.drop(table, gone)
            part.whole[table] |= done
        part.coming, part.told = None, []
        if buckets.size:
            part.coming = np.zeros(NUM_BUCKETS, np.bool_)
            part.coming[buckets] = True

    def _end_pass(self, part: _Part, frame: Frame) -> None:
        header, received = frame.header, time.monotonic()
        sent = header.clock / 1e6
        part.offset = min(part.offset, received - sent)
        part.since[header.table] = header.version
        if header.table == 0:  # the pass's first: buckets that come later on are newer than this
            part.route_epoch = header.route_epoch
        if part.whole[header.table][self._routes.owned_by(part.number)].all():
            part.moments[header.table] = sent + part.offset

    def _learn(self, routes: Routes) -> None:
        with self._lock:
            if routes.epoch <= self._routes.epoch:
                return
            before, self._routes = self._moment(), routes
            for number in routes.addresses:
                part = self._parts.setdefault(number, _Part(number, len(self._salts)))
                mine = routes.owned_by(number)
                for whole in part.whole:
                    whole &= mine
                if not part.whole[0][mine].all():  # what it is about to tell is as the former owners had told it
                    part.moments = [before] * len(self._salts)
        self._follow_all()

    def _moment(self) -> float:
        return min(min(self._parts[number].moments) for number in np.unique(self._routes.owners).tolist())

"""The shard's side of the serving feed: passes over what has changed, and the gRPC method that sends them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.feed.messages import METHOD, FeedRequest, Longs, Mark, Mask, unpack_buckets
from parameter_server.grpc_status import abort
from parameter_server.security.security import import_grpc
from parameter_server.shard.changes import Changes
from parameter_server.wire import MAX_FRAME_BYTES, Header, Op, encode, join

if TYPE_CHECKING:
    import grpc

ROWS_AT_ONCE = 100_000  # copied under the shard's lock
MAX_READERS = 4  # each keeps a thread of the server


class ChangesSource(Protocol):
    """What the feed needs of a shard."""

    @property
    def description(self) -> RunDescription:
        """The run's."""

    def changes(self, table: int, since: int, buckets: Mask | None) -> Changes:
        """Looks at a table, all at one moment; rows of buckets that the shard does not own are left out.

        Args:
            table: Number of the table.
            since: Rows changed after this version.
            buckets: [4096] those of interest; None: none, only to see the numbers.
        """


class FeedSession:
    """One reader, as its shard sees it.

    Args:
        source: The shard.
        request: The reader's.
        history: Of the shard's versions.
        now: Seconds; readers compare its differences only.

    Raises:
        RefusedError: The request is not of this run.
    """

    def __init__(
        self,
        source: ChangesSource,
        request: FeedRequest,
        history: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        tables = source.description.tables
        if request.run_id != source.description.run_id:
            raise _wrong(f"expected run {source.description.run_id}, got {request.run_id}")
        if len(request.since) != len(tables):
            raise _wrong(f"expected versions of {len(tables)} tables, got {len(request.since)}")
        self._source, self._history, self._now = source, history, now
        is_known = request.history == history
        whole = unpack_buckets(request.whole) & is_known
        self._since = [version if is_known else 0 for version in request.since]
        self._epochs = [request.route_epoch] * len(tables)
        self._whole = [whole.copy() for _ in tables]

    def messages(self) -> Iterator[bytes]:
        """Makes one pass.

        Raises:
            RefusedError: The reader is of a version that is yet to come.
        """
        for table in range(len(self._since)):
            yield from self._tell_whole(table)
            yield from self._tell_changed(table)

    def _tell_whole(self, table: int) -> Iterator[bytes]:
        """Tells all rows of the buckets that the reader lacks, some buckets at a time."""
        seen = self._source.changes(table, 0, None)
        if self._since[table] > seen.version:
            raise _wrong(f"expected a version of table {table} up to {seen.version}, got {self._since[table]}")
        # What came here since the last pass is read anew, also if it had been here before.
        held = self._whole[table] & (seen.claims > 0) & (seen.claims <= self._epochs[table])
        held &= self._since[table] >= seen.evictions_since
        missing = np.flatnonzero((seen.claims > 0) & ~held)
        if not held.any():
            self._since[table] = seen.version
        for some in np.array_split(missing, 1 + seen.num_rows // ROWS_AT_ONCE) if missing.size else ():
            buckets = np.zeros(held.size, np.bool_)
            buckets[some] = True
            found = self._source.changes(table, 0, buckets)
            buckets &= found.claims > 0
            yield self._message(Op.EVICTED, Mark.WHOLE, table, found, np.flatnonzero(buckets))
            yield from self._rows(table, found)
            held |= buckets
        if missing.size:
            yield self._message(Op.EVICTED, Mark.WHOLE, table, seen, missing[:0])
        self._whole[table], self._epochs[table] = held, seen.route_epoch

    def _tell_changed(self, table: int) -> Iterator[bytes]:
        """Tells what has changed, also in what was told whole before this moment, which is the pass's."""
        moment = self._now()
        found = self._source.changes(table, self._since[table], self._whole[table])
        if found.evicted.size:
            yield self._message(Op.EVICTED, Mark.CHANGED, table, found, found.evicted)
        yield from self._rows(table, found)
        yield self._message(Op.RECORDS, Mark.END, table, found, None, moment)
        self._since[table] = found.version

    def _rows(self, table: int, found: Changes) -> Iterator[bytes]:
        step = max(1, MAX_FRAME_BYTES // (8 + found.weights[:1].nbytes))
        for first in range(0, found.ids.size, step):
            some = slice(first, first + step)
            header = self._header(Op.RECORDS, Mark.CHANGED, table, found)
            yield join([encode(header, found.ids[some], found.weights[some])])

    def _message(self, op: Op, mark: Mark, table: int, found: Changes, ids: Longs | None, moment: float = 0.0) -> bytes:
        return join([encode(self._header(op, mark, table, found, moment), ids)])

    def _header(self, op: Op, mark: Mark, table: int, found: Changes, moment: float = 0.0) -> Header:
        return Header(
            op=op,
            run_id=self._source.description.run_id,
            seq=self._history,
            table=table,
            route_epoch=found.route_epoch,
            codec=mark,
            clock=int(moment * 1e6),
            version=found.version,
        )


def add_feed_to(server: grpc.Server, source: ChangesSource) -> None:
    """Lets readers follow a shard through its server; each keeps one of the server's threads."""
    grpc = import_grpc()
    history = secrets.randbits(63) + 1
    places = threading.BoundedSemaphore(MAX_READERS)

    def follow(message: bytes, context: Any) -> Iterator[bytes]:
        if not places.acquire(blocking=False):
            many = f"feed: expected at most {MAX_READERS} readers at a time"
            abort(RefusedError(Refusal.RESOURCE_EXHAUSTED, many), context)
        try:
            is_over = threading.Event()
            if not context.add_callback(is_over.set):
                return
            yield from follow_shard(source, message, history, is_over)
        except Exception as error:
            abort(error, context, faults_pass=True)
        finally:
            places.release()

    _, service, name = METHOD.split("/")
    handler = grpc.unary_stream_rpc_method_handler(follow)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))


def follow_shard(source: ChangesSource, message: bytes, history: int, is_over: threading.Event) -> Iterator[bytes]:
    """Gives the messages that answer a request, pass after pass, until told that it is over.

    Raises:
        RefusedError: The request is wrong.
    """
    request = FeedRequest.decode(message)
    session = FeedSession(source, request, history)
    next_pass = time.monotonic()
    while not is_over.wait(max(0.0, next_pass - time.monotonic())):
        next_pass = time.monotonic() + request.seconds
        yield from session.messages()


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, f"feed: {message}")

"""What changes a shard while its lock is held: each change is made, counted, and written to the journal, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from parameter_server.dense_codec import PIECE_SALT
from parameter_server.errors import RefusedError
from parameter_server.shard.guarded_state import GuardedState
from parameter_server.shard.marks import check_not_frozen, check_places
from parameter_server.shard.records_file import Kind
from parameter_server.wire import Flag, Frame, Header, encode, length_of

Parts = list[bytes | memoryview]


class ShardWrites:
    """Makes changes to a state, within its ``busy``."""

    def __init__(self, guarded: GuardedState) -> None:
        self._guarded, self._state, self._counts = guarded, guarded.state, guarded.counts

    def push(self, frame: Frame, message: memoryview, *, now: float, epoch: int) -> Parts:
        """Applies a push, if it has not been before, and answers it.

        Args:
            frame: Checked.
            message: Its bytes.
            now: Seconds since 1970.
            epoch: Of the routes.

        Raises:
            RefusedError: It is out of order, or a row is elsewhere or about to be; nothing has changed.
            OSError: It could not be written.
        """
        header, state, counts = frame.header, self._state, self._counts
        table = state.tables[header.table]
        if state.orders.check(header):
            counts.duplicates += 1
            return encode(answer_to(header, table.version, epoch, Flag.DUPLICATE))
        try:
            fresh = state.find_fresh(frame, self._guarded.places)
        except RefusedError as error:
            error.expected_seq = header.seq
            raise
        before, evicted = table.version, table.num_evicted
        state.push(frame, fresh, now)
        self._guarded.write(Kind.PUSH, now, [message])
        if header.n:  # else it tells of its clock, and nothing was computed from what was pulled here
            counts.count_staleness(header.table, before, header.version)
            counts.pushes += 1
        counts.pushed_rows += header.n - fresh.skipped
        counts.pushed_bytes += message.nbytes
        counts.skipped_rows += fresh.skipped
        counts.evicted_rows += table.num_evicted - evicted
        return encode(answer_to(header, table.version, epoch))

    def exchange(self, frame: Frame, message: memoryview, *, now: float, epoch: int) -> Parts:
        """Exchanges pieces of the dense part.

        Raises:
            RefusedError: A piece is elsewhere or about to be, or see ``DensePieces.check``; nothing has changed.
            OSError: It could not be written.
        """
        dense, places = self._state.dense, self._guarded.places
        check_places(frame.ids, PIECE_SALT, places)
        dense.check(frame)
        is_new = dense.changes(frame)
        if is_new:
            check_not_frozen(frame.ids, PIECE_SALT, places)
        answer = dense.apply(frame)
        if is_new:
            self._guarded.write(Kind.DENSE, now, [message])
        self._counts.dense_calls += 1
        flags = Flag.REPLY if is_new else Flag.REPLY | Flag.DUPLICATE
        return encode(frame.header._replace(flags=flags, route_epoch=epoch), values=np.ascontiguousarray(answer))


def cut(message: bytes, frames: Sequence[Frame]) -> Iterator[memoryview]:
    """Gives the bytes of each frame of a message."""
    at, view = 0, memoryview(message)
    for header, *_ in frames:
        end = at + length_of(header)
        yield view[at:end]
        at = end


def answer_to(asked: Header, version: int, epoch: int, flags: int = 0) -> Header:
    """Makes the head of an answer."""
    return asked._replace(flags=Flag.REPLY | flags, n=0, version=version, route_epoch=epoch)

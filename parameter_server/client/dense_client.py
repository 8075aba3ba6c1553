"""The client's half of an exchange of the dense part: pieces to their shards and back, sent again until answered."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDoneError  # a name of its own before Python 3.11
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parameter_server.client.damaged_answers import decode_answer
from parameter_server.client.retries import Patience, passes
from parameter_server.client.shard_connections import RoutesSource, RoutesWatch, ShardConnections
from parameter_server.dense_codec import MAX_FRAME_PIECES, PIECE, PIECE_SALT, Combine, Floats
from parameter_server.errors import ConnectionLost, LaneLostError, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Longs, Routes, buckets_of
from parameter_server.transports import ShardConnection
from parameter_server.wire import Flag, Header, Op, encode, join

FRAMES_AT_A_TIME = 4  # per shard, so that other calls get their turn
SILENT_SECONDS = 1.0  # of trouble before it is spoken of: a move of buckets is over by then


class Place(NamedTuple):
    """What an exchange is known by: the same numbers are sent under it, or none; see ``DensePieces``."""

    lane: int
    lease: int
    clock: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Pieces that are combined in one way.

    Attributes:
        combine: The way.
        place: Of the exchange; reads have no use for it.
        pieces: [n] numbers of the pieces, ascending.
        values: [n, PIECE]; None to read.
        factor: See ``Combine``.
        momentum: Of AVERAGE.
    """

    combine: Combine
    place: Place
    pieces: Longs
    values: Floats | None = None
    factor: float = 1.0
    momentum: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Call:
    """A part on its way."""

    part: Part
    numbers: int
    answers: Floats
    missing: NDArray[np.bool_] = field(init=False)  # [n]: which rows have no answer yet

    def __post_init__(self) -> None:
        self.missing = np.ones(len(self.part.pieces), bool)


class _Sent(NamedTuple):
    call: _Call
    rows: Longs
    shard: int
    until: float  # when it is given up and sent again
    answer: Future[bytes]


class DenseClient:
    """Exchanges pieces with the shards that hold them, for one thread at a time.

    A frame that was not answered is sent again as it was, so that a shard which has applied it says so again. Shards
    that are away are tried until the deadline.

    Args:
        run_id: Of the run.
        source: Of routes.
        connect: Opens a connection to an address; this client closes it.
        deadline_seconds: For how long an exchange is tried again.
        attempt_seconds: After which a frame without an answer is sent again.
        say: Takes a line when a shard has been away for a second, and one when it is back; None prints to stderr.

    Attributes:
        retries: How often something had to be sent again.
    """

    def __init__(
        self,
        run_id: int,
        source: RoutesSource,
        connect: Callable[[str], ShardConnection],
        *,
        deadline_seconds: float = 120.0,
        attempt_seconds: float = 30.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._run_id, self._source = run_id, source
        self.deadline_seconds, self._attempt_seconds = deadline_seconds, attempt_seconds
        self._say = say or _print_line
        self._connections = ShardConnections(connect)
        self._watch = RoutesWatch(source, self._connections.keep)
        self._closed = threading.Event()
        self.retries = 0

    def exchange(self, parts: Sequence[Part], own: Floats, numbers: int) -> list[Floats]:
        """Exchanges parts, and gives the answers to each: [n, PIECE].

        Args:
            parts: Which share no piece.
            own: [pieces, PIECE]: this trainer's whole vector, for pieces that a shard has lost.
            numbers: Of the vector.

        Raises:
            ShardUnreachableError: The deadline has passed.
            LaneLostError: Somebody else has the lane.
            RefusedError: The exchange is wrong, and stays so.
        """
        calls = [
            _Call(part=part, numbers=numbers, answers=np.empty((len(part.pieces), PIECE), np.float32)) for part in parts
        ]
        outage = _Outage(self._say, self.deadline_seconds)
        while any(call.missing.any() for call in calls):
            if self._closed.is_set():
                raise ShardUnreachableError("dense part: closed while an exchange was under way")
            self._send_once(calls, own, outage)
            if (pause := outage.next_pause()) is not None:
                self.retries += 1
                self._closed.wait(pause)
        outage.end()
        return [call.answers for call in calls]

    def close(self) -> None:
        """Closes all connections; an exchange under way ends with an error."""
        self._closed.set()
        self._connections.close()
        self._watch.close()

    def _send_once(self, calls: Sequence[_Call], own: Floats, outage: _Outage) -> None:
        """Sends what has no answer, once around.

        Raises:
            LaneLostError, RefusedError: A refusal does not pass.
        """
        absent: list[tuple[_Call, Longs]] = []
        try:
            routes = self._source.current()
            for sent in self._send(calls, routes):
                try:
                    self._receive(sent)
                except Exception as error:
                    self._check_passes(error)
                    outage.note(f"shard {sent.shard} at {routes.addresses[sent.shard]}", error)
                    if isinstance(error, RefusedError) and error.refusal == Refusal.OUT_OF_RANGE:
                        absent.append((sent.call, sent.rows))
                    else:
                        self._watch.ask(routes.epoch)  # beside this: who is away may come back elsewhere
        except ConnectionError as error:  # of the coordinator
            outage.note("routes", error)
        for call, rows in absent:
            self._bring(call, rows, own, outage)

    def _bring(self, call: _Call, rows: Longs, own: Floats, outage: _Outage) -> None:
        """Sets pieces that a shard has never had, or has lost, and leaves the exchange to the next time around."""
        pieces = call.part.pieces[rows]
        bringing = Part(combine=Combine.SET_IF_ABSENT, place=call.part.place, pieces=pieces, values=own[pieces])
        answers = np.empty((len(pieces), PIECE), np.float32)
        self._send_once([_Call(part=bringing, numbers=call.numbers, answers=answers)], own, outage)

    def _check_passes(self, error: Exception) -> None:
        """Checks that what went wrong may be better next time.

        Raises:
            Exception: It will not.
        """
        is_lost = isinstance(error, RefusedError) and error.refusal == Refusal.FAILED_PRECONDITION and not error.moved
        if is_lost:
            raise LaneLostError(f"dense part: {error}") from error
        if not passes(error):
            raise error

    def _send(self, calls: Sequence[_Call], routes: Routes) -> Iterator[_Sent]:
        """Sends frames to all shards side by side, some to each at a time, and gives them in the order of sending."""
        waiting: dict[int, list[tuple[_Call, Longs]]] = {}
        for call in calls:
            rows = np.flatnonzero(call.missing)
            owners = routes.owners[buckets_of(call.part.pieces[rows], PIECE_SALT)]
            for shard in np.unique(owners).tolist():
                mine = rows[owners == shard]
                frames = [mine[at : at + MAX_FRAME_PIECES] for at in range(0, len(mine), MAX_FRAME_PIECES)]
                waiting.setdefault(shard, []).extend((call, frame) for frame in frames)
        while waiting:
            until = time.monotonic() + self._attempt_seconds
            under_way = [
                _Sent(call, rows, shard, until, self._connections.to(routes.addresses[shard]).push_pull_dense(message))
                for shard, frames in waiting.items()
                for call, rows in frames[:FRAMES_AT_A_TIME]
                for message in [self._encode(call, rows, routes.epoch)]
            ]
            yield from under_way
            waiting = {shard: rest for shard, frames in waiting.items() if (rest := frames[FRAMES_AT_A_TIME:])}

    def _encode(self, call: _Call, rows: Longs, epoch: int) -> bytes:
        part, place = call.part, call.part.place
        header = Header(
            op=Op.DENSE,
            run_id=self._run_id,
            lane=place.lane,
            lease=place.lease,
            clock=place.clock,
            codec=part.combine,
            route_epoch=epoch,
            version=call.numbers,
            factor=part.factor,
            eps_factor=part.momentum,
        )
        return join([encode(header, part.pieces[rows], None if part.values is None else part.values[rows])])

    def _receive(self, sent: _Sent) -> None:
        try:
            message = sent.answer.result(max(0.0, sent.until - time.monotonic()))
        except NotDoneError:
            raise ConnectionLost(f"expected an answer within {self._attempt_seconds:g} s, got none") from None
        frames = decode_answer(message)
        values = frames[0].values
        if len(frames) != 1 or not frames[0].header.flags & Flag.REPLY or values.shape != (len(sent.rows), PIECE):
            raise ConnectionLost(f"expected {len(sent.rows)} pieces in answer, got {len(values)}")
        sent.call.answers[sent.rows] = values
        sent.call.missing[sent.rows] = False


class _Outage:
    """What has gone wrong within an exchange, which is spoken of once."""

    def __init__(self, say: Callable[[str], None], deadline_seconds: float) -> None:
        self._say, self._patience = say, Patience(deadline_seconds)
        self._began = time.monotonic()
        self._failed: tuple[str, Exception] | None = None  # by last, this time around
        self._has_spoken = False

    def note(self, where: str, error: Exception) -> None:
        """Takes down that something has failed."""
        self._failed = (where, error)

    def next_pause(self) -> float | None:
        """Gives how long to wait before the next time around, and speaks of trouble that lasts; None if there was none.

        Raises:
            ShardUnreachableError: It has lasted for too long.
        """
        if self._failed is None:
            return None
        (where, error), self._failed = self._failed, None
        pause = self._patience.fail(f"dense part, {where}", error)
        if not self._has_spoken and time.monotonic() - self._began > SILENT_SECONDS:
            self._has_spoken = True
            self._say(f"dense part: no answer to an exchange, which is tried again ({where}: {error})")
        return pause

    def end(self) -> None:
        """Says that it is over, if anything was said."""
        if self._has_spoken:
            self._say(f"dense part: answered again after {time.monotonic() - self._began:.0f} s")


def _print_line(line: str) -> None:
    print(f"recforge: {line}", file=sys.stderr, flush=True)

"""The pushes of one lane to one shard: numbered, sent some at a time, and sent again with the same numbers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from parameter_server.client.damaged_answers import decode_answer
from parameter_server.client.frame_cutting import resplit
from parameter_server.client.retries import Patience, passes
from parameter_server.errors import LaneLostError, Refusal, RefusedError
from parameter_server.partition import Routes
from parameter_server.wire import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_FRAMES,
    Counts,
    Flag,
    Header,
    Longs,
    Op,
    Values,
    encode,
    join,
)

_LOG = logging.getLogger(__name__)
_NUMBERINGS = 255  # of a lease: what the header's ``codec`` can tell apart


class LaneLease(NamedTuple):
    """A lane, and which of its leases; both as the coordinator gave them."""

    lane: int
    lease: int


class PendingPush:
    """What one call has pushed: done once every frame of it is acknowledged."""

    def __init__(self) -> None:
        self.done: Future[None] = Future()
        self.frames = 0

    def acknowledge(self) -> None:
        """Takes note that one frame has been applied."""
        self.frames -= 1
        if not self.frames and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Gives the push up."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False)
class QueuedFrame:
    """A frame that is not acknowledged; ``seq`` is 0 until it is sent for the first time."""

    shard: int
    header: Header
    ids: Longs
    values: Values
    counts: Counts
    pending: PendingPush
    seq: int = 0
    is_sent: bool = False
    is_applied: bool = False

    def encode(self) -> list[bytes | memoryview]:
        """Lays it out."""
        return encode(self.header._replace(seq=self.seq), self.ids, self.values, self.counts)

    def part(self, shard: int, rows: NDArray[np.bool_]) -> QueuedFrame:
        """Makes one for a shard of some of its rows [n], that has not been sent."""
        counts = self.counts[rows] if self.counts.size else self.counts
        return QueuedFrame(shard, self.header, self.ids[rows], self.values[rows], counts, self.pending)

    def acknowledge(self) -> None:
        """Takes note, once, that it has been applied."""
        if not self.is_applied:
            self.is_applied = True
            self.pending.acknowledge()


class StreamOwner(Protocol):
    """What streams need of the client; all of it on one thread."""

    loop: asyncio.AbstractEventLoop
    window: int
    deadline_seconds: float
    keeps_pushes: bool  # whether the run promises that nothing acknowledged is lost

    @property
    def is_paused(self) -> bool:
        """Whether nothing may be sent now."""

    def send(self, shard: int, message: bytes, finish: Callable[[Future[bytes]], None]) -> None:
        """Sends a message, and has its end told on the thread."""

    def place_of(self, shard: int) -> str:
        """Names a shard and its address."""

    def ask_routes(self) -> None:
        """Asks for newer routes."""

    def fail_lane(self, lane: LaneLease, error: Exception) -> None:
        """Gives up all that a lane has pushed."""

    def quieten(self) -> None:
        """Is told that a message is no longer under way."""


class PushStream:
    """Frames in order. Messages are sent ahead of answers until one fails; then all from there on go again.

    The first message sent again goes alone. What a shard says of it then is not about messages that it has not seen.
    """

    def __init__(self, lane: LaneLease, shard: int, owner: StreamOwner) -> None:
        self.lane, self.shard, self._owner = lane, shard, owner
        self.frames: deque[QueuedFrame] = deque()
        self.in_flight = 0
        self._next_seq = 1
        self._numberings = 0
        self._is_probing = False
        self._trouble: tuple[int, Exception] | None = None
        self._patience = Patience(owner.deadline_seconds)
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def add(self, frame: QueuedFrame) -> None:
        """Queues a frame; ``send`` sends it."""
        self.frames.append(frame)

    def send(self) -> None:
        """Sends what may be sent now."""
        window = 1 if self._is_probing else self._owner.window
        while not (self._is_closed or self._owner.is_paused or self._timer or self._trouble):
            frames = list(self._next_message()) if self.in_flight < window else []
            if not frames:
                return
            self.in_flight += 1
            for frame in frames:
                frame.is_sent = True
                if not frame.seq:
                    frame.seq, self._next_seq = self._next_seq, self._next_seq + 1
                    frame.header = frame.header._replace(codec=self._numberings)
            message = join([frame.encode() for frame in frames])
            self._owner.send(self.shard, message, partial(self._finish, frames))

    def take_moved(self, routes: Routes, salts: list[np.uint64]) -> list[QueuedFrame]:
        """Takes out rows that lie on other shards by now, as frames for those; nothing may be under way.

        A frame that has a number keeps it, though it may be empty by now: the shard may have seen it. Once it has seen
        one cut by the newer routes, it refuses what comes late and was cut by earlier ones: that may hold rows of
        buckets that have moved away and back, and whose earlier pushes are queued behind it.
        """
        moved, kept = [], deque[QueuedFrame]()
        for frame in self.frames:
            frame.header = frame.header._replace(route_epoch=routes.epoch)
            parts = dict(resplit(frame.ids, salts[frame.header.table], routes.owners))
            mine = parts.pop(self.shard, np.zeros(len(frame.ids), np.bool_))
            for shard, theirs in parts.items():
                moved.append(frame.part(shard, theirs))
                frame.pending.frames += 1
            if parts:
                left = frame.part(self.shard, mine)
                frame.ids, frame.values, frame.counts = left.ids, left.values, left.counts
            if frame.ids.size or frame.seq:
                kept.append(frame)
            else:
                frame.acknowledge()
        self.frames = kept
        return moved

    def resume(self) -> None:
        """Goes on at once, if it was waiting to try again."""
        if self._timer:
            self._timer.cancel()
            self._retry()

    def close(self, error: Exception | None = None) -> None:
        """Ends the stream; frames that are left fail with an error, or count as applied."""
        self._is_closed = True
        if self._timer:
            self._timer.cancel()
        while self.frames:
            frame = self.frames.popleft()
            if error is None:
                frame.acknowledge()
            else:
                frame.pending.fail(error)

    def _next_message(self) -> Iterator[QueuedFrame]:
        """Gives frames of one clock, as many as fit."""
        length, clock = 0, None
        unsent = (frame for frame in self.frames if not frame.is_sent)
        for frame in islice(unsent, MAX_MESSAGE_FRAMES):
            length += frame.ids.nbytes + frame.values.nbytes + frame.counts.nbytes + 2 * HEADER_BYTES
            if clock is not None and (length > MAX_FRAME_BYTES or frame.header.clock != clock):
                return
            clock = frame.header.clock
            yield frame

    def _finish(self, frames: list[QueuedFrame], sent: Future[bytes]) -> None:
        self.in_flight -= 1
        if not self._is_closed:
            try:
                applied = _count_applied(frames, sent)
                for frame in frames[:applied]:
                    frame.acknowledge()
                while self.frames and self.frames[0].is_applied:
                    self.frames.popleft()
                self._is_probing = False
                self._patience.reset()
                if applied < len(frames):
                    message = f"{applied} of {len(frames)} frames applied"
                    self._note(frames[applied].seq, RefusedError(Refusal.OUT_OF_RANGE, message))
            except Exception as error:
                self._note(frames[0].seq, error)
            if self._trouble and not self.in_flight:
                self._recover(*self._trouble)
            self.send()
        self._owner.quieten()

    def _note(self, seq: int, error: Exception) -> None:
        if not self._trouble or seq < self._trouble[0]:
            self._trouble = (seq, error)

    def _recover(self, seq: int, error: Exception) -> None:
        """Tries again later, or gives the lane up, once nothing is under way, for the first message that failed."""
        owner = self._owner
        try:
            delay = self._judge(seq, error)
        except Exception as final:
            owner.fail_lane(self.lane, final)
            return
        if not _is_gap(error):
            owner.ask_routes()
        elif self._patience.attempts == 1:
            delay = 0.0  # what was sent too early, or not looked at, may go at once
        self._timer = owner.loop.call_later(delay, self._retry)

    def _judge(self, seq: int, error: Exception) -> float:
        """Says how long to wait before trying again.

        Raises:
            Exception: There is no use in trying again.
        """
        what = f"{self._owner.place_of(self.shard)}, lane {self.lane.lane}, push {seq}"
        if isinstance(error, RefusedError):
            if error.refusal is Refusal.FAILED_PRECONDITION and not error.moved:
                raise LaneLostError(f"{what}: {error}") from error
            if _is_gap(error) and self._is_probing:
                self._renumber(what, error)
        if not passes(error):
            raise error
        return self._patience.fail(what, error)

    def _renumber(self, what: str, error: RefusedError) -> None:
        """Goes on with the number that a restarted shard expects, where it has lost pushes."""
        first, expected = self.frames[0].seq, error.expected_seq
        if expected is None or expected >= first:
            return
        if self._owner.keeps_pushes:
            raise LaneLostError(f"{what}: expected a shard that keeps what it has acknowledged, got {error}")
        if self._numberings == _NUMBERINGS:
            message = f"{what}: expected at most {_NUMBERINGS} times that the shard loses pushes of one lease, got more"
            raise LaneLostError(message)
        _LOG.warning("%s: the shard has lost %d acknowledged pushes of this lane", what, first - expected)
        self._next_seq = expected
        self._numberings += 1  # the shard refuses what comes late and has a number of the old kind
        for frame in self.frames:
            frame.seq = 0

    def _retry(self) -> None:
        self._timer = self._trouble = None
        self._is_probing = True
        for frame in self.frames:
            frame.is_sent = frame.is_applied
        self.send()


def _is_gap(error: Exception) -> bool:
    return isinstance(error, RefusedError) and error.refusal is Refusal.OUT_OF_RANGE


def _count_applied(frames: list[QueuedFrame], sent: Future[bytes]) -> int:
    """Says how many of a message's frames a shard has applied, now or before.

    Raises:
        RefusedError: None of them.
        ConnectionLost: Nobody knows.
    """
    answers = decode_answer(sent.result())
    for frame, answer in zip(frames, answers, strict=False):
        head = answer.header
        if head.op != Op.PUSH or not head.flags & Flag.REPLY or head.seq != frame.seq:
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"expected an answer to push {frame.seq}, got {head}")
    if not 0 < len(answers) <= len(frames):
        raise RefusedError(Refusal.INVALID_ARGUMENT, f"expected up to {len(frames)} answers, got {len(answers)}")
    return len(answers)

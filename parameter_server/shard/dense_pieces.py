"""The master copy of the dense part, as far as a shard holds it: pieces that trainers exchange with, each push once.

A piece is to its shard what a row is: it lies in a bucket, and what lies in the bucket moves and is kept together: the
piece, what its update needs, which exchanges it has seen and what it answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parameter_server.dense_codec import MAX_FRAME_PIECES, MAX_PIECES, PIECE, PIECE_SALT, Combine, Floats
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of
from parameter_server.shard.dense_update import OPTIONS, ServerUpdate, move_by_block, pull_elastically
from parameter_server.shard.lane_order import CLIENT_LANES
from parameter_server.wire import Frame, Header

_SETS = (Combine.SET_IF_ABSENT, Combine.ASSIGN)
_COUNTED = (Combine.EASGD, Combine.AVERAGE, Combine.GRADIENT, Combine.ASSIGN, Combine.FOLLOW)
_STATE = "state."


@dataclass
class _Piece:
    master: Floats  # [PIECE]
    state: dict[str, Floats]
    marks: dict[int, tuple[int, int]] = field(default_factory=dict)  # by `_key`: lease and clock of the last exchange
    answers: dict[int, Floats] = field(default_factory=dict)  # by lane, of exchanges whose answer only they can give


class DensePieces:
    """The pieces that lie on a shard, called under its lock.

    **Order and retries.** A frame is known by (lane, lease, clock), piece by piece, so ``seq`` has no part in it and is
    0: a shard checks the run and the routes (``PIECE_SALT``) and nothing else, asks whether the frame ``changes``
    something, calls ``apply``, and keeps what did in its journal, where applying the same frames in the same order
    gives the same pieces bit for bit. A piece that has seen an exchange answers it again as it did, and does not move:
    the marks that say so lie beside it, wherever it is. Dense clocks are apart from those of pushes, and have no part
    in a table's updates. An answer is as long as its frame with values, and a read has none: who takes messages of
    several frames bounds the sum of their ids.

    Gradients are those of a batch of a *training* lane: whatever the lease, each (lane, clock) is taken once, so that
    a chunk which is computed again changes nothing. All else is exchanged in a lane of the trainer's own, where each
    lease counts its exchanges from 1, one after the other.

    Args:
        description: Its ``dense`` says what trainers may do to pieces; ``settings["dense_options"]`` are options of a
            server-side optimizer.

    Attributes:
        numbers: Of the whole vector, once a trainer has brought it.
    """

    def __init__(self, description: RunDescription) -> None:
        self._mode, self._lanes = description.dense, description.lanes
        self._update = ServerUpdate(description.dense, description.settings.get(OPTIONS))
        self._pieces: dict[int, _Piece] = {}
        self._heard: dict[int, None] = {}  # trainers' own lanes, the one that was last heard of last
        self.numbers = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def check(self, frame: Frame) -> None:
        """Checks a frame whole; changes nothing.

        Raises:
            RefusedError: INVALID_ARGUMENT: it is wrong. OUT_OF_RANGE: a piece is absent; send SET_IF_ABSENT first.
                FAILED_PRECONDITION: it is of an earlier lease, or an exchange that is over.
        """
        header, codec = frame.header, self._check_form(frame)
        if codec in _SETS:
            self._check_numbers(frame)
        elif absent := [number for number in frame.ids.tolist() if number not in self._pieces]:
            raise RefusedError(Refusal.OUT_OF_RANGE, f"dense: expected piece {absent[0]} to be set first, got none")
        if codec in _COUNTED and codec != Combine.GRADIENT:
            for piece in self._present(frame):
                if _place(header) < (seen := piece.marks.get(_key(header), (0, 0))):
                    message = f"dense, lane {header.lane}: expected lease {seen[0]}, exchange {seen[1]} or later"
                    raise RefusedError(Refusal.FAILED_PRECONDITION, f"{message}, got {_place(header)}")
                if codec == Combine.EASGD and seen == _place(header) and header.lane not in piece.answers:
                    raise _wrong(f"expected another exchange than {header.clock} of lane {header.lane}, got it twice")

    def changes(self, frame: Frame) -> bool:
        """Says of a frame that ``check`` lets pass whether it changes something: else it is a read, or came before."""
        codec = frame.header.codec
        if codec == Combine.SET_IF_ABSENT:
            return any(number not in self._pieces for number in frame.ids.tolist())
        return codec != Combine.READ and any(self._is_fresh(frame.header, n) for n in frame.ids.tolist())

    def apply(self, frame: Frame) -> Floats:
        """Does what a frame says to the pieces that have not seen it, and gives the answers, [n, PIECE].

        Raises:
            RefusedError: See ``check``; nothing has changed.
        """
        self.check(frame)
        header, numbers = frame.header, frame.ids.tolist()
        fresh = [i for i, number in enumerate(numbers) if self._is_fresh(header, number)]
        if fresh and header.codec != Combine.READ:
            self._apply(Combine(header.codec), header, [numbers[i] for i in fresh], frame.values[fresh])
        return self.last_answer(frame)

    def last_answer(self, frame: Frame) -> Floats:
        """Gives the answers to a frame that has been applied, [n, PIECE]."""
        pieces = [self._pieces[number] for number in frame.ids.tolist()]
        if frame.header.codec == Combine.EASGD:
            return np.stack([piece.answers[frame.header.lane] for piece in pieces])
        return np.stack([piece.master for piece in pieces])

    def forget(self, lane: int) -> None:
        """Drops what is known of a lane whose trainer has left, and will not send anything again."""
        self._heard.pop(lane, None)
        for piece in self._pieces.values():
            piece.marks.pop(lane, None)
            piece.marks.pop(~lane, None)
            piece.answers.pop(lane, None)

    def take(self, buckets: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
        """Gives copies of all that lies in buckets [4096], as arrays by name, which ``put`` takes; empty ones if none.

        Returns:
            ``numbers`` [1] int64; ``pieces`` [n] int64, ``master`` [n, PIECE] and ``state.<name>`` [n, ...] float32;
            ``marks`` [m, 4] int64 of piece, lane (~lane: of its gradients), lease and clock, in the order in which
            lanes were last heard of;
            ``answered`` [k, 2] int64 of piece and lane, and ``answers`` [k, PIECE] float32.
        """
        taken = self._find(buckets)
        heard = {lane: place for place, lane in enumerate(self._heard)}
        marks = [(n, key, *mark) for n in taken for key, mark in self._pieces[n].marks.items()]
        marks.sort(key=lambda mark: (heard.get(max(mark[1], ~mark[1]), -1), mark[:2]))
        answers = [(n, lane, answer) for n in taken for lane, answer in self._pieces[n].answers.items()]
        return {
            "numbers": np.array([self.numbers], np.int64),
            "pieces": np.array(taken, np.int64),
            "master": _stack([self._pieces[n].master for n in taken], PIECE),
            **{
                _STATE + name: _stack([self._pieces[n].state[name] for n in taken], array.size)
                for name, array in self._update.new_state().items()
            },
            "marks": np.array(marks, np.int64).reshape(-1, 4),
            "answered": np.array([found[:2] for found in answers], np.int64).reshape(-1, 2),
            "answers": _stack([found[2] for found in answers], PIECE),
        }

    def put(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what ``take`` gave, here or elsewhere; pieces that are here already are replaced."""
        self.numbers = max(self.numbers, int(state["numbers"][0]))
        names = self._update.new_state()
        for i, number in enumerate(state["pieces"].tolist()):
            own = {name: state[_STATE + name][i].copy() for name in names}
            self._pieces[number] = _Piece(state["master"][i].copy(), own)
        for number, key, lease, clock in state["marks"].tolist():
            self._pieces[number].marks[key] = (lease, clock)
            self._hear(max(key, ~key))
        for (number, lane), answer in zip(state["answered"].tolist(), state["answers"], strict=True):
            self._pieces[number].answers[lane] = answer.copy()

    def fits(self, state: Mapping[str, NDArray[Any]]) -> bool:
        """Says whether ``put`` can take all of something of the right shapes, that another shard has sent."""
        pieces, numbers = state["pieces"], state["numbers"]
        known = np.union1d(pieces, np.array(list(self._pieces), np.int64))
        marks, answered = state["marks"], state["answered"]
        lanes = np.concatenate([np.where(marks[:, 1] < 0, ~marks[:, 1], marks[:, 1]), answered[:, 1]])
        states = [array for name, array in state.items() if name.startswith(_STATE) or name == "master"]
        return bool(
            len(numbers) == 1
            and 0 <= numbers[0] <= MAX_PIECES * PIECE
            and all(len(array) == len(pieces) and np.isfinite(array).all() for array in states)
            and len(np.unique(pieces)) == len(pieces)
            and ((pieces >= 0) & (pieces * PIECE < numbers[0])).all()
            and np.isin(marks[:, 0], known).all()
            and np.isin(answered[:, 0], known).all()
            and ((lanes >= 0) & (lanes < self._lanes + CLIENT_LANES)).all()
            and (marks[:, 2:] >= 0).all()
            and len(answered) == len(state["answers"])
        )

    def drop(self, buckets: NDArray[np.bool_]) -> int:
        """Removes all that lies in buckets [4096], and says how many pieces that were."""
        dropped = self._find(buckets)
        for number in dropped:
            del self._pieces[number]
        return len(dropped)

    def _apply(self, codec: Combine, header: Header, numbers: list[int], values: Floats) -> None:
        if codec in _SETS:
            self.numbers = header.version
            for number, given in zip(numbers, values, strict=True):
                piece = self._pieces.setdefault(number, _Piece(np.empty(PIECE, np.float32), {}))
                piece.master[:], piece.state = given, self._update.new_state()
        pieces = [self._pieces[number] for number in numbers]
        factor = np.float32(header.factor)
        if codec == Combine.GRADIENT:
            states = [piece.state for piece in pieces]
            self._update.step([piece.master for piece in pieces], states, values, header.factor)
        for piece, given in zip(pieces, values, strict=True):
            if codec == Combine.EASGD:
                piece.answers[header.lane] = pull_elastically(piece.master, given, factor)
            elif codec == Combine.FOLLOW:
                piece.master += factor * (given - piece.master)
            elif codec == Combine.AVERAGE:
                momentum = np.float32(header.eps_factor)
                move_by_block(piece.master, piece.state["velocity"], given, factor, momentum)
            if codec in _COUNTED:
                piece.marks[_key(header)] = _place(header)
        if codec in _COUNTED:
            self._hear(header.lane)

    def _is_fresh(self, header: Header, number: int) -> bool:
        """Says whether a piece has not seen an exchange yet."""
        piece = self._pieces.get(number)
        if header.codec not in _COUNTED:
            return piece is None
        return piece is None or piece.marks.get(_key(header), (0, 0)) < _place(header)

    def _hear(self, lane: int) -> None:
        """Notes that a trainer's own lane is in use, and forgets the one that was silent longest if there are too many.

        No more trainers than lanes take part at a time, so it is one of a trainer that has gone.
        """
        if lane < self._lanes:
            return
        self._heard.pop(lane, None)
        self._heard[lane] = None
        if len(self._heard) > self._lanes:
            self.forget(next(iter(self._heard)))

    def _present(self, frame: Frame) -> list[_Piece]:
        return [self._pieces[number] for number in frame.ids.tolist() if number in self._pieces]

    def _find(self, buckets: NDArray[np.bool_]) -> list[int]:
        numbers = np.array(sorted(self._pieces), np.int64)
        found: list[int] = numbers[buckets[buckets_of(numbers, PIECE_SALT)]].tolist()
        return found

    def _check_form(self, frame: Frame) -> Combine:
        """Checks all of a frame that can be seen without the pieces."""
        header, ids = frame.header, frame.ids
        if header.codec not in _CODECS:
            raise _wrong(f"expected a codec of this release, got {header.codec}")
        codec = Combine(header.codec)
        is_of_mode = {Combine.AVERAGE: self._mode == "average", Combine.GRADIENT: self._update.takes_gradients}
        if not is_of_mode.get(codec, True):
            raise _wrong(
                f"expected exchanges of mode {self._mode}, got {codec.name}; "
                "all trainers must have the same --dense-average.mode"
            )
        if not 0 < ids.size <= MAX_FRAME_PIECES:
            raise _wrong(f"expected 1 to {MAX_FRAME_PIECES} pieces in a frame, got {ids.size}")
        if ids[0] < 0 or ids[-1] >= MAX_PIECES or not np.all(ids[1:] > ids[:-1]):
            raise _wrong(f"expected ascending numbers of pieces below {MAX_PIECES}, got {ids[0]} to {ids[-1]}")
        if codec != Combine.READ:
            if frame.values.shape != (len(ids), PIECE) or frame.values.dtype != np.float32:
                raise _wrong(f"expected float32 values of {len(ids)} x {PIECE}, got {frame.values.shape}")
            if not np.isfinite(frame.values).all():
                raise _wrong(f"expected finite numbers from lane {header.lane}, got others")
        if codec in _COUNTED and header.clock < 1:
            raise _wrong(f"expected exchanges to be counted from 1, got {header.clock}")
        _check_factors(codec, header)
        return codec

    def _check_numbers(self, frame: Frame) -> None:
        numbers = frame.header.version
        if not frame.ids[-1] * PIECE < numbers <= MAX_PIECES * PIECE:
            raise _wrong(f"expected the vector's length beside piece {frame.ids[-1]}, got {numbers}")
        if self._pieces and numbers != self.numbers:
            raise _wrong(f"expected a model of {self.numbers:,} numbers, as the others', got one of {numbers:,}")


def _check_factors(codec: Combine, header: Header) -> None:
    factor, momentum = header.factor, header.eps_factor
    if codec == Combine.EASGD and not 0 < factor < 1:
        raise _wrong(f"expected alpha in (0, 1), above which copies move apart, got {factor}")
    if codec == Combine.FOLLOW and not 0 < factor <= 1:
        raise _wrong(f"expected a factor in (0, 1], got {factor}")
    if codec == Combine.AVERAGE and not (0 < factor <= 1 and 0 <= momentum < 1):
        raise _wrong(f"expected a factor in (0, 1] and momentum in [0, 1), got {factor} and {momentum}")
    if codec == Combine.GRADIENT and not 0 <= factor < np.inf:
        raise _wrong(f"expected a factor of the learning rate >= 0, got {factor}")


def _place(header: Header) -> tuple[int, int]:
    """Gives what an exchange is known by within its lane."""
    return (0 if header.codec == Combine.GRADIENT else header.lease, header.clock)


def _key(header: Header) -> int:
    """Gives the key of a lane's mark; gradients, which are known by their clock alone, have one of their own."""
    return ~header.lane if header.codec == Combine.GRADIENT else header.lane


def _stack(arrays: list[Floats], width: int) -> Floats:
    return np.stack(arrays) if arrays else np.zeros((0, width), np.float32)


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, f"dense: {message}")


_CODECS = frozenset(Combine)

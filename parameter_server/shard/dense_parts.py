"""What ``DensePieces.take`` gives, cut: to the buckets that one of several shards wants, or to what a message holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parameter_server.dense_codec import PIECE_SALT
from parameter_server.partition import buckets_of

Arrays = dict[str, NDArray[Any]]
_OF_MARKS = ("marks",)
_OF_ANSWERS = ("answered", "answers")
_ONCE = ("numbers",)


def keep_buckets(taken: Arrays, buckets: NDArray[np.bool_]) -> Arrays:
    """Keeps the pieces that lie in buckets [4096], and what belongs to them."""
    pieces = taken["pieces"][buckets[buckets_of(taken["pieces"], PIECE_SALT)]]
    return _select(taken, np.isin(taken["pieces"], pieces), np.isin(taken["marks"][:, 0], pieces), _of(taken, pieces))


def cut_pieces(taken: Arrays, size: int) -> Iterator[Arrays]:
    """Cuts all that was taken, so that nothing holds many more bytes: first pieces with their marks, then answers."""
    of_pieces = [name for name in taken if name not in (*_ONCE, *_OF_MARKS, *_OF_ANSWERS)]
    none = np.zeros(len(taken["answered"]), np.bool_)
    step = max(1, size // max(1, sum(taken[name][:1].nbytes for name in of_pieces)))
    for first in range(0, len(taken["pieces"]), step):
        pieces = taken["pieces"][first : first + step]
        yield _select(taken, np.isin(taken["pieces"], pieces), np.isin(taken["marks"][:, 0], pieces), none)
    step = max(1, size // max(1, taken["answers"][:1].nbytes))
    for first in range(0, len(taken["answered"]), step):
        answers = none.copy()
        answers[first : first + step] = True
        yield _select(taken, np.zeros(len(taken["pieces"]), np.bool_), np.zeros(len(taken["marks"]), np.bool_), answers)


def _of(taken: Arrays, pieces: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.isin(taken["answered"][:, 0], pieces)


def _select(taken: Arrays, pieces: NDArray[np.bool_], marks: NDArray[np.bool_], answers: NDArray[np.bool_]) -> Arrays:
    wanted = dict.fromkeys(_OF_MARKS, marks) | dict.fromkeys(_OF_ANSWERS, answers)
    return {name: array if name in _ONCE else array[wanted.get(name, pieces)] for name, array in taken.items()}

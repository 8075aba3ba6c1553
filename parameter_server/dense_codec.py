"""What both ends of an exchange of the dense part agree on: how its vector is cut, and how pieces are combined."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parameter_server.partition import salt_of
from parameter_server.wire import HEADER_BYTES, MAX_FRAME_BYTES

Floats = NDArray[np.float32]

PIECE = 16_384
"""Numbers of a piece: 64 KiB, so that a dense part of some millions spreads over shards evenly."""
MAX_PIECES = 1 << 16  # 4 GiB
MAX_FRAME_PIECES = (MAX_FRAME_BYTES - HEADER_BYTES - 16) // (8 + 4 * PIECE)
"""Of one frame, so that it and its answer are no longer than a frame may be."""
PIECE_SALT = salt_of("dense")
"""Of the pieces' numbers: piece p is in bucket hash(p, PIECE_SALT), as a row of a table is."""


class Combine(IntEnum):
    """What ``Op.DENSE`` does to a piece m of the master copy, given values x; the codec of its frames."""

    SET_IF_ABSENT = 1
    """m <- x where there is none yet. Answers m."""
    READ = 2
    """Without values. Answers m."""
    EASGD = 3
    """d = factor * (x - m), m <- m + d. Answers d."""
    AVERAGE = 4
    """v <- eps_factor * v + factor * x, m <- m + v, where x is a change. Answers m."""
    GRADIENT = 5
    """The run's optimizer takes a step with gradient x and its learning rate times factor. Answers m."""
    ASSIGN = 6
    """m <- x; what had been learned about m (v, the optimizer's state) begins anew. Answers m."""
    FOLLOW = 7
    """m <- m + factor * (x - m). Answers m."""


def count_pieces(numbers: int) -> int:
    """Says into how many pieces a vector is cut."""
    return -(-numbers // PIECE)


def cut_pieces(vector: NDArray[Any]) -> Floats:
    """Cuts a vector [n] into pieces [p, PIECE] float32, the last one filled up with zeros; a copy."""
    pieces = np.zeros((count_pieces(vector.size), PIECE), np.float32)
    pieces.reshape(-1)[: vector.size] = vector
    return pieces

"""Answers that were damaged on their way count as lost, so that the call is made again, and not as wrong for good."""

from __future__ import annotations

from parameter_server.errors import ConnectionLost, RefusedError
from parameter_server.wire import Frame, decode


def decode_answer(answer: bytes) -> list[Frame]:
    """Checks a shard's answer whole, and gives its frames.

    Raises:
        ConnectionLost: It is cut or damaged.
    """
    try:
        return decode(answer)
    except RefusedError as error:
        raise ConnectionLost(f"expected a whole answer, got a damaged one: {error}") from error

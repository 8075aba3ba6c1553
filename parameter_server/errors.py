"""What a shard or the coordinator refuses, with the status that says what the caller should do about it."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """Why a call was refused; the names are those of gRPC's status codes."""

    INVALID_ARGUMENT = "the call is wrong, and stays so"
    OUT_OF_RANGE = "it comes before another one that has not arrived: send it again a little later"
    FAILED_PRECONDITION = "it belongs elsewhere or to an earlier lease: ask the coordinator anew"
    RESOURCE_EXHAUSTED = "there is no room: send it again later"
    UNAVAILABLE = "not ready, or gone: send it again later"
    UNAUTHENTICATED = "token or certificate are missing or wrong"
    DATA_LOSS = "what was to be kept could not be kept: the shard stops"


class RefusedError(ValueError):
    """A call that was refused; nothing of it has been applied but frames before ``expected_seq``.

    Attributes:
        refusal: Why.
        retry_after_seconds: When to try again, where that helps.
        expected_seq: Of a push: the number that the shard expects next of this lane and lease, where it knows.
        moved: Of FAILED_PRECONDITION: whether rows lie elsewhere by now; else the lease is an earlier one.
    """

    def __init__(
        self,
        refusal: Refusal,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        expected_seq: int | None = None,
        moved: bool = False,
    ) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.retry_after_seconds = retry_after_seconds
        self.expected_seq = expected_seq
        self.moved = moved


class ConnectionLost(ConnectionError):
    """A call without an answer: whether it was worked on is not known."""


class ShardUnreachableError(TimeoutError):
    """A shard did not answer, or refused for now, for longer than a client was told to try."""


class LaneLostError(RuntimeError):
    """A lane was leased to somebody else, or its pushes cannot go on; its batches have to be computed anew."""


def wrong(message: str) -> RefusedError:
    """Makes the error for a call that is wrong and stays so."""
    return RefusedError(Refusal.INVALID_ARGUMENT, message)

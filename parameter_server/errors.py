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
    """A call that was refused; nothing of it has been applied.

    Attributes:
        refusal: Why.
        retry_after_seconds: When to try again, where that helps.
    """

    def __init__(self, refusal: Refusal, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal
        self.retry_after_seconds = retry_after_seconds

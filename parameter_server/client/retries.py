"""How long a client goes on trying, and how long it waits in between."""

from __future__ import annotations

import random
import time
from concurrent.futures import CancelledError

from parameter_server.errors import Refusal, RefusedError, ShardUnreachableError

FIRST_SECONDS, LONGEST_SECONDS = 0.02, 1.0
# A shard that loses data stops, and another one starts in its place.
_PASSING = (Refusal.UNAVAILABLE, Refusal.RESOURCE_EXHAUSTED, Refusal.OUT_OF_RANGE, Refusal.DATA_LOSS)


class Patience:
    """Counts attempts that failed one after the other.

    Args:
        deadline_seconds: After the first of them, there is no further one.
    """

    def __init__(self, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self.reset()

    def reset(self) -> None:
        """Forgets failures, after a success."""
        self.attempts = 0
        self._since = 0.0

    def fail(self, what: str, error: BaseException) -> float:
        """Counts a failure, and says after how many seconds to try again: ever longer, and not with all the others.

        Args:
            what: Was tried; names the shard.
            error: How it failed.

        Raises:
            ShardUnreachableError: It has been tried for long enough.
        """
        now = time.monotonic()
        self._since = self._since if self.attempts else now
        self.attempts += 1
        if now - self._since > self._deadline_seconds:
            raise ShardUnreachableError(
                f"{what}: expected success within {self._deadline_seconds:g} s, got {self.attempts} failures in "
                f"{now - self._since:.1f} s, the last one: {error}"
            ) from error
        delay = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(self.attempts - 1, 10)) * random.uniform(0.5, 1.0)
        told = error.retry_after_seconds if isinstance(error, RefusedError) else None
        return max(delay, min(told or 0.0, LONGEST_SECONDS))


def passes(error: BaseException) -> bool:
    """Says whether a call that failed may succeed later, with other routes perhaps."""
    if isinstance(error, RefusedError):
        return error.moved or error.refusal in _PASSING
    return isinstance(error, ConnectionError | CancelledError)  # cancelled: by what closed the connection

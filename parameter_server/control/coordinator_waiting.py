"""Calls that wait for something on the coordinator, in steps; and the routes that heartbeats bring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from parameter_server.coordinator.answers import Beat
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.partition import Routes

Answer = TypeVar("Answer")
_STEP_SECONDS = 2.0  # of one waiting call; longer waits are several
_FULL_SECONDS = 0.05  # after which a coordinator that has no room for waiting calls is asked again


class RoutesFollower:
    """Lets heartbeats tell which routes are used here, and fetches newer ones that their answers speak of."""

    def __init__(self) -> None:
        self._takers: list[Callable[[Routes], None]] = []
        self._epoch = 0

    def follow_routes(self, take: Callable[[Routes], None]) -> None:
        """Has newer routes told to somebody from now on, by the thread that sends heartbeats."""
        self._takers.append(take)

    def beat(
        self,
        facts: Mapping[str, float] | None,
        send: Callable[[Mapping[str, float]], Beat],
        ask: Callable[[int], Routes],
    ) -> Beat:
        """Sends a heartbeat; ``ask`` gives routes newer than an epoch, which are there.

        Raises:
            ConnectionLost: The coordinator is not reached, or ends.
            RefusedError: It refuses.
        """
        known = {"route_epoch": float(self._epoch)} if self._takers else {}
        try:
            answer = send({**known, **(facts or {})})
        except RefusedError as error:
            if error.refusal is not Refusal.UNAVAILABLE:
                raise
            raise ConnectionLost(f"coordinator: {error}") from error
        if self._takers and answer.route_epoch > self._epoch:
            try:
                routes = ask(self._epoch)
            except (TimeoutError, ConnectionLost):  # with the next heartbeat
                return answer
            for take in self._takers:
                take(routes)
            self._epoch = routes.epoch
        return answer


def wait_for(ask: Callable[[float], Answer | None], what: str, deadline_seconds: float | None) -> Answer:
    """Asks in steps until there is an answer.

    Args:
        ask: Waits for so many seconds at most; None: not yet.
        what: That is waited for.
        deadline_seconds: None: for ever.

    Raises:
        TimeoutError: There was none in time.
    """
    end = None if deadline_seconds is None else time.monotonic() + deadline_seconds
    while True:
        step = _STEP_SECONDS if end is None else max(0.0, min(_STEP_SECONDS, end - time.monotonic()))
        began = time.monotonic()
        if (answer := ask(step)) is not None:
            return answer
        if end is not None and time.monotonic() >= end:
            raise TimeoutError(f"coordinator: expected {what} within {deadline_seconds:g} s, got none")
        if time.monotonic() - began < step / 2:
            time.sleep(_FULL_SECONDS)

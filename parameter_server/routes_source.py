"""The routes as one process knows them: kept here, so that a coordinator that is away disturbs nobody."""

from __future__ import annotations

import threading
import time

from parameter_server.coordinator_client import CoordinatorClient
from parameter_server.errors import ConnectionLost
from parameter_server.partition import Routes

WAIT_SECONDS = 2.0


class CoordinatorRoutes:
    """Keeps the newest routes, and asks for newer ones where somebody needs them.

    Args:
        client: Of the coordinator.
        routes: To begin with; None asks for them.
    """

    def __init__(self, client: CoordinatorClient, routes: Routes | None = None) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._routes = client.routes() if routes is None else routes

    def current(self) -> Routes:
        """Gives the newest known ones, without asking."""
        with self._lock:
            return self._routes

    def newer_than(self, epoch: int) -> Routes:
        """Waits for routes of a later epoch, some seconds at most, and gives the newest ones, later or not.

        Whoever asks may want to end: there may be no later ones for as long as the run lasts.
        """
        end = time.monotonic() + WAIT_SECONDS
        with self._asking:
            while (known := self.current()).epoch <= epoch and (left := end - time.monotonic()) > 0:
                try:
                    self.take(self._client.routes(max(epoch, known.epoch), deadline_seconds=left))
                except TimeoutError:
                    break
                except ConnectionLost:
                    time.sleep(min(0.1, left))
            return self.current()

    def take(self, routes: Routes) -> None:
        """Takes routes that came some other way; older ones are left."""
        with self._lock:
            if routes.epoch > self._routes.epoch:
                self._routes = routes

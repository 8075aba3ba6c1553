"""The routes as one process knows them: kept here, so that a coordinator that is away disturbs nobody."""

from __future__ import annotations

import threading
import time

from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.errors import ConnectionLost
from parameter_server.partition import Routes

_ASK_SECONDS = 1.0
_AGAIN_SECONDS = 0.1


class FixedRoutes:
    """Routes that never change, where there is no coordinator.

    Args:
        routes: Of all shards.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def current(self) -> Routes:
        """Gives them."""
        return self._routes

    def newer_than(self, epoch: int) -> Routes:
        """Gives them after a moment, if newer ones are asked for."""
        if self._routes.epoch <= epoch:
            time.sleep(_AGAIN_SECONDS)
        return self._routes


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
        client.follow_routes(self.take)

    def current(self) -> Routes:
        """Gives the newest known ones, without asking."""
        with self._lock:
            return self._routes

    def newer_than(self, epoch: int) -> Routes:
        """Waits for routes of a later epoch, some seconds at most, and gives the newest ones, later or not."""
        with self._asking:
            known = self.current()
            if known.epoch <= epoch:
                try:
                    self.take(self._client.routes(epoch, deadline_seconds=_ASK_SECONDS))
                except TimeoutError:
                    pass
                except ConnectionLost:
                    time.sleep(_AGAIN_SECONDS)
            return self.current()

    def take(self, routes: Routes) -> None:
        """Takes routes that came some other way; older ones are left."""
        with self._lock:
            if routes.epoch > self._routes.epoch:
                self._routes = routes

"""A client's connections, one per address, and its newest routes, which are asked for beside everything else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from parameter_server.errors import ConnectionLost
from parameter_server.partition import Routes
from parameter_server.transports import ShardConnection

_LOG = logging.getLogger(__name__)


class RoutesSource(Protocol):
    """Knows routes; its methods may be called from several threads."""

    def current(self) -> Routes:
        """Gives the newest known; waits for the first ones."""

    def newer_than(self, epoch: int) -> Routes:
        """Waits for routes of a later epoch, some seconds at most, and gives the newest ones, later or not."""


class ShardConnections:
    """Connections by address, opened when they are needed.

    Args:
        connect: Opens one.
    """

    def __init__(self, connect: Callable[[str], ShardConnection]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._open: dict[str, ShardConnection] = {}
        self._is_closed = False

    def to(self, address: str) -> ShardConnection:
        """Gives the connection to an address.

        Raises:
            ConnectionLost: The client has been closed.
            ValueError: The address cannot be used.
        """
        with self._lock:
            if self._is_closed:
                raise ConnectionLost("the client is closed")
            if address not in self._open:
                self._open[address] = self._connect(address)
            return self._open[address]

    def keep(self, routes: Routes) -> None:
        """Closes those that routes do not name."""
        with self._lock:
            gone = [self._open.pop(address) for address in list(self._open) if address not in routes.addresses.values()]
        for connection in gone:
            connection.close()

    def close(self) -> None:
        """Closes all."""
        with self._lock:
            self._is_closed = True
            gone = list(self._open.values())
            self._open.clear()
        for connection in gone:
            connection.close()


class RoutesWatch:
    """Asks for newer routes, once at a time.

    Args:
        source: Is asked.
        learn: Is told of newer routes, on any thread.
    """

    def __init__(self, source: RoutesSource, learn: Callable[[Routes], None]) -> None:
        self._source, self._learn = source, learn
        self._lock = threading.Lock()
        self._is_asking = False
        self._thread = ThreadPoolExecutor(1, "routes")
        self._is_closed = False

    def ask(self, epoch: int) -> None:
        """Asks for routes newer than those of an epoch, unless that is under way."""
        with self._lock:
            if self._is_asking or self._is_closed:
                return
            self._is_asking = True
            asked = self._thread.submit(self._source.newer_than, epoch)
        asked.add_done_callback(lambda asked: self._finish(epoch, asked))

    def close(self) -> None:
        """Waits until the last question is answered."""
        with self._lock:
            self._is_closed = True
        self._thread.shutdown(cancel_futures=True)

    def _finish(self, epoch: int, asked: Future[Routes]) -> None:
        with self._lock:
            self._is_asking = False
        if asked.cancelled() or self._is_closed:
            return
        if error := asked.exception():
            _LOG.warning("routes newer than epoch %d: %s", epoch, error)  # asked again with the next attempt
        elif asked.result().epoch > epoch:
            self._learn(asked.result())

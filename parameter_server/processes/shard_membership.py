"""A shard's place in a run: its number, its heartbeats, and the routes that these bring."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Protocol

from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.coordinator.answers import Registered
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, RefusedError
from parameter_server.partition import Routes
from parameter_server.shard.counts import ShardCounts

BEATS_PER_LEASE = 4
LONGEST_BEAT_SECONDS = 1.0  # so that what people see of rows is not old
_LOG = logging.getLogger(__name__)


class Followed(Protocol):
    """What heartbeats tell of a shard, and bring to it."""

    counts: ShardCounts

    @property
    def num_rows(self) -> list[int]:
        """Of each table."""

    @property
    def num_bytes(self) -> int:
        """Of all tables."""

    def set_routes(self, routes: Routes) -> None:
        """Takes over newer routes."""


def await_description(client: CoordinatorClient) -> RunDescription:
    """Waits for the run's description, as long as it takes: the first trainer brings it.

    Raises:
        ConnectionError: The coordinator cannot be reached.
    """
    return RunDescription.from_json(client.describe())


class ShardMembership:
    """A shard that is registered from now on, until it leaves.

    Args:
        client: Of the coordinator.
        name: By which the shard gets its number back.
        address: Where others reach it.

    Raises:
        RefusedError: The coordinator does not take it.
        ConnectionError: It cannot be reached.

    Attributes:
        number: Of the shard.
        held_buckets: Whether some were this shard's when it registered.
        may_end: Whether it is drained, and nobody uses it any longer.
    """

    def __init__(self, client: CoordinatorClient, name: str, address: str) -> None:
        self._client = client
        self._name, self._address = name, address
        self.may_end = False
        self._shard: Followed | None = None
        self._trouble: Exception | None = None
        self._registered = self._register(former=0)
        self.number = self._registered.shard if self._registered.shard is not None else -1
        routes = self._registered.routes
        self.held_buckets = routes is not None and bool(routes.owned_by(self.number).any())
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._beating.start()

    def __enter__(self) -> ShardMembership:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        self._beating.join()
        try:
            self._client.leave(self._registered.member)
        except (ConnectionError, RefusedError):  # who is not heard of any more has left as well
            _LOG.info("left without the coordinator's knowledge", extra={"event": "left"})

    def follow(self, shard: Followed) -> None:
        """Brings routes to a shard from now on, and tells of it with each heartbeat."""
        if self._registered.routes is not None:
            shard.set_routes(self._registered.routes)
        self._client.follow_routes(shard.set_routes)
        self._shard = shard

    def check(self) -> None:
        """Checks that the shard still has a place in the run.

        Raises:
            RefusedError: The coordinator does not take it back.
        """
        if self._trouble is not None:
            raise self._trouble

    def _register(self, former: int) -> Registered:
        return self._client.register("shard", self._name, self._address, former=former)

    def _beat(self) -> None:
        while not self._left.wait(min(LONGEST_BEAT_SECONDS, self._registered.lease_seconds / BEATS_PER_LEASE)):
            try:
                self._beat_once()
            except ConnectionLost:
                continue  # a coordinator that is started again goes on from its disk
            except Exception as error:
                self._trouble = error
                return

    def _beat_once(self) -> None:
        beat = self._client.heartbeat(self._registered.member, self._facts())
        if not beat.known:
            _LOG.warning("was not heard of in time, and registers again", extra={"event": "expired"})
            self._registered = self._register(former=self._registered.member)
            return
        self.may_end = beat.may_end

    def _facts(self) -> dict[str, float]:
        shard = self._shard
        if shard is None:
            return {}
        counts = shard.counts
        return {
            "rows": sum(shard.num_rows),
            "bytes": shard.num_bytes,
            "lost_pushes": counts.lost_pushes,
            "pulled_rows": counts.pulled_rows,
            "pushed_rows": counts.pushed_rows,
            "pushes": counts.pushes,
            "staleness_sum": counts.staleness_sum,
        }

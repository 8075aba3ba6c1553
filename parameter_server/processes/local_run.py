"""A whole run in one process, without gRPC: a coordinator and its shards, for notebooks and tests."""

from __future__ import annotations

from pathlib import Path

from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.moves import ShardKeeper
from parameter_server.description import RunDescription
from parameter_server.shard.control import ShardControl
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

SCHEME = "local:"


class LocalRun:
    """A coordinator and shards, which end with this object.

    So it is used::

        with LocalRun(description, shards=2) as run:
            rows = RowsClient(description, CoordinatorRoutes(run.client), run.connect)

    Args:
        description: Of the run.
        shards: How many.
        folder: For what shards keep; needed where the run's durability asks for any.
        lease_seconds: How long a member may be silent; a shard of this process needs no heartbeats.
    """

    def __init__(
        self, description: RunDescription, *, shards: int = 1, folder: Path | None = None, lease_seconds: float = 3600.0
    ) -> None:
        self.coordinator = Coordinator(description, start_shards=shards, lease_seconds=lease_seconds)
        self.keeper = ShardKeeper(self.coordinator, self._control_at)
        self.client = LocalCoordinatorClient(self.coordinator, self.keeper)
        described = self.coordinator.description
        assert described is not None
        self.description = described
        places = [None if folder is None else folder / f"shard-{number}" for number in range(shards)]
        self.shards = [Shard(described, number, folder=place) for number, place in enumerate(places)]
        self.controls = [ShardControl(shard, self._control_at) for shard in self.shards]
        for number in range(shards):
            self.coordinator.register("shard", f"shard-{number}", f"{SCHEME}{number}")
        routes = self.client.routes()
        for shard in self.shards:
            shard.set_routes(routes)

    def connect(self, address: str) -> LocalConnection:
        """Opens a connection to a shard, given its address in the routes."""
        return LocalConnection(self.shards[int(address.removeprefix(SCHEME))])

    def _control_at(self, address: str) -> ShardControl:
        return self.controls[int(address.removeprefix(SCHEME))]

    def close(self) -> None:
        """Ends the shards and the coordinator."""
        self.keeper.close()
        for control in self.controls:
            control.stop()
        for shard in self.shards:
            shard.close()
        self.client.close()
        self.coordinator.close()

    def __enter__(self) -> LocalRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""All shards of a run as a trainer sees them: tables whose rows lie there, saved and waited for together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing

from dlrm.asynchronous.config import ServersConfig
from parameter_server.client.dense_client import DenseClient
from parameter_server.client.remote_storage import RemoteStorage
from parameter_server.client.remote_tables import AskingShards, RemoteSequenceTables, RemoteTables
from parameter_server.client.rows_client import RowsClient
from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.description import RunDescription
from parameter_server.errors import RefusedError
from parameter_server.transports import ShardConnection


class Shards:
    """All shards of a run.

    Args:
        client: of the coordinator.
        connect: opens a connection to a shard's address.
        description: of the run.
        config: of this trainer.
        pools: whether tables give a vector for each bag, or else one for each id.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        connect: Callable[[str], ShardConnection],
        description: RunDescription,
        config: ServersConfig,
        *,
        pools: bool = True,
    ) -> None:
        self._client, self._connect, self._description, self._config = client, connect, description, config
        self._routes = CoordinatorRoutes(client)
        with ExitStack() as opened:  # what is refused later closes what was opened before
            rows = RowsClient(
                description,
                self._routes,
                connect,
                value_type=config.values,
                max_in_flight=config.max_in_flight,
                deadline_seconds=config.deadline_seconds,
            )
            opened.enter_context(closing(rows))
            storage = RemoteStorage(description, self._routes, connect, deadline_seconds=config.deadline_seconds)
            opened.enter_context(closing(storage))
            kind: type[AskingShards] = RemoteTables if pools else RemoteSequenceTables
            self.tables = kind(description, rows, storage=storage)
            self._opened = opened.pop_all()
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._saving: Future[None] | None = None

    def open_dense(self) -> DenseClient:
        """Open a client of the dense part, which is its user's to close."""
        return DenseClient(
            self._description.run_id, self._routes, self._connect, deadline_seconds=self._config.deadline_seconds
        )

    def save(self) -> None:
        """Have all shards save, in the background; one that is under way is enough.

        Where a shard is away, there is no snapshot, and people are told; shards keep what they had.
        """
        if self._description.durability == "none" or (self._saving is not None and not self._saving.done()):
            return
        if self._saving is not None:
            self._saving.result()
        self._saving = self._thread.submit(self._save)

    def wait(self) -> None:
        """Wait until all pushes are acknowledged, and what is saved is saved."""
        self.tables.drain()
        if self._saving is not None:
            self._saving.result()

    def _save(self) -> None:
        try:
            self._client.snapshot()
        except (ConnectionError, TimeoutError, RefusedError) as error:
            print(f"recforge: warning: no snapshot was taken, which the next one makes good: {error}", file=sys.stderr)

    def close(self) -> None:
        """Close all connections; what is not acknowledged is given up."""
        self._thread.shutdown(cancel_futures=True)
        self._opened.close()

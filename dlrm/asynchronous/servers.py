"""What a trainer asks of all shards at once: to save, and to have acknowledged what was pushed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from parameter_server.coordinator_answers import SnapshotTaken
from parameter_server.coordinator_client import CoordinatorClient
from parameter_server.remote_tables import RemoteTables


class Shards:
    """All shards of a run.

    Args:
        client: of the coordinator.
        tables: whose rows lie there.
        is_kept: whether shards save anything.
    """

    def __init__(self, client: CoordinatorClient, tables: RemoteTables, *, is_kept: bool) -> None:
        self._client, self._tables, self._is_kept = client, tables, is_kept
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._saving: Future[SnapshotTaken] | None = None

    def save(self) -> None:
        """Have all shards save, in the background; one that is under way is enough.

        Raises:
            ValueError: the one before could not be taken.
        """
        if not self._is_kept or (self._saving is not None and not self._saving.done()):
            return
        if self._saving is not None:
            self._saving.result()
        self._saving = self._thread.submit(self._client.snapshot)

    def wait(self) -> None:
        """Wait until all pushes are acknowledged, and what is saved is saved."""
        self._tables.drain()
        if self._saving is not None:
            self._saving.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

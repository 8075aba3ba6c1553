"""A shard's state behind its lock: one change at a time, each kept as was promised, and none after one could not be."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes
from parameter_server.shard.counts import STALENESS_BINS, ShardCounts
from parameter_server.shard.folder import ShardFolder, SnapshotInfo
from parameter_server.shard.journal import Journal, JournalSync
from parameter_server.shard.lane_order import LaneOrder
from parameter_server.shard.marks import ELSEWHERE, FROZEN, HERE, Places
from parameter_server.shard.records_file import Kind
from parameter_server.shard.state import ShardState

Mask = NDArray[np.bool_]
_RETRY_SECONDS = 0.1
EVICTED_SECONDS = 600.0  # for which ids of evicted rows are known at least, to readers that come back
_EVICTED_STEPS = 10


class GuardedState:
    """What all calls of a shard share.

    Args:
        description: Of the run.
        number: Of the shard.
        folder: Where it is kept; None: nowhere.
        sync: Of the journal.

    Attributes:
        state: To be used within ``busy`` only.
        places: Of the buckets, likewise.
        counts: Likewise.
        lines: What a person should know of what was read back.
        failed: Why everything is refused, or None.
    """

    def __init__(self, description: RunDescription, number: int, folder: Path | None, sync: JournalSync) -> None:
        self.number = number
        self.failed: str | None = None
        self.counts = ShardCounts(staleness=np.zeros((len(description.tables), STALENESS_BINS), np.int64))
        self.places: Places = np.full(NUM_BUCKETS, ELSEWHERE, np.uint8)
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._is_closed = False
        self._versions_at: deque[tuple[float, list[int]]] = deque()  # seconds since 1970, versions of the tables
        self._routes: Routes | None = None
        self._folder = None if folder is None else ShardFolder(folder, description, number, sync, self.counts)
        self.state = ShardState(description) if self._folder is None else self._folder.state
        self._journal: Journal | None = self._folder.journal if self._folder else None
        self.lines: list[str] = self._folder.lines if self._folder else []

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Holds the lock.

        Raises:
            RefusedError: With DATA_LOSS: a change failed half way, or could not be written, now or before.
        """
        with self._lock:
            began = time.perf_counter()
            try:
                if self.failed is not None:
                    raise RefusedError(Refusal.DATA_LOSS, f"shard {self.number}: {self.failed}")
                yield
            except ValueError:  # what raises it has changed nothing
                raise
            except Exception as error:
                raise self._fail(error) from error
            finally:
                self.counts.lock_seconds += time.perf_counter() - began

    def epoch(self) -> int:
        """Gives that of the routes.

        Raises:
            RefusedError: There are none yet.
        """
        if self._routes is None:
            message = f"shard {self.number}: no routes yet"
            raise RefusedError(Refusal.UNAVAILABLE, message, retry_after_seconds=_RETRY_SECONDS)
        return self._routes.epoch

    def write(self, kind: Kind, seconds: float, body: Sequence[bytes | memoryview]) -> None:
        """Writes a change that was made to the journal, if there is one; if that fails, nobody may see the change.

        Raises:
            OSError: It could not be written.
        """
        if self._journal is not None:
            self._journal.append(kind, seconds, body)
            self.counts.journal_bytes = self._journal.num_bytes

    def written(self) -> int:
        """Says, within ``busy``, what to ``settle``."""
        return 0 if self._journal is None else self._journal.position

    def settle(self, position: int, orders: Mapping[int, LaneOrder] | None = None) -> None:
        """Waits, outside of ``busy``, until what is written is kept as was promised.

        Args:
            position: What ``written`` said.
            orders: Of lanes, with the pushes that are acknowledged hereby.

        Raises:
            RefusedError: It could not be kept.
        """
        if self._journal is not None:
            try:
                self._journal.settle(position)
            except OSError as error:
                raise self._fail(error) from error
            self.counts.journal_syncs = self._journal.syncs
            self.counts.journal_sync_seconds = self._journal.sync_seconds
        if self._folder is not None and orders:
            self._folder.acknowledged.note(orders)

    def set_routes(self, routes: Routes) -> None:
        """See ``Shard``; within ``busy``."""
        if self._routes is not None and routes.epoch < self._routes.epoch:
            return
        self._routes = routes
        mine = routes.owned_by(self.number)
        frozen = mine & (self.places == FROZEN)
        self.places = np.where(frozen, FROZEN, np.where(mine, HERE, ELSEWHERE)).astype(np.uint8)
        self.claim(mine & (self.state.claims <= 0), max(1, routes.epoch))

    def claim(self, buckets: Mask, epoch: int) -> None:
        """Takes down, within ``busy``, that buckets are whole here since routes of an epoch; see ``ShardState``."""
        if buckets.any():
            self.state.claims[buckets] = epoch
            self.write(Kind.CLAIM, time.time(), [self.state.claims.tobytes()])

    def forget_evicted(self, now: float) -> None:
        """Forgets, within ``busy``, what was evicted long ago, where no snapshot does so."""
        if self.state.description.durability != "none":
            return
        if not self._versions_at or now - self._versions_at[-1][0] >= EVICTED_SECONDS / _EVICTED_STEPS:
            self._versions_at.append((now, self.state.versions))
        while now - self._versions_at[0][0] > EVICTED_SECONDS:
            for table, version in zip(self.state.tables, self._versions_at.popleft()[1], strict=True):
                table.forget_evicted(version)

    def save(self) -> SnapshotInfo:
        """See ``Shard.snapshot``."""
        if self._folder is None:
            raise ValueError(f"shard {self.number}: expected a folder for snapshots, got none; set --folder")
        if self.state.description.durability == "none":
            raise ValueError(f"shard {self.number}: expected a run that keeps its rows, got one of durability none")
        with self._saving:
            try:
                return self._folder.save(self.busy)
            except OSError as error:
                raise self._fail(error) from error

    def close(self) -> None:
        """Closes files; everything is refused from now on."""
        with self._saving, self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self.failed = self.failed or "closed"
            self.state.close()
            if self._folder is not None:
                self._folder.close()

    def each(self, calls: Sequence[Callable[[], list[bytes | memoryview]]]) -> list[bytes | memoryview]:
        """Makes calls one after the other, within ``busy``, and joins their answers, up to the first that is refused.

        Raises:
            RefusedError: The first one was, or what was done could not be written.
        """
        parts: list[bytes | memoryview] = []
        for call in calls:
            try:
                parts += call()
            except RefusedError:
                self.counts.refused += 1
                if not parts:
                    raise
                break
        return parts

    def _fail(self, error: Exception) -> RefusedError:
        if self.failed is None:
            self.failed = f"stopped, as what was pushed could not be kept: {error!r}; make room, and start it again"
        return RefusedError(Refusal.DATA_LOSS, f"shard {self.number}: {self.failed}")

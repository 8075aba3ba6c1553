"""A shard: the engine that answers pulls and applies pushes, each exactly once; it knows no gRPC and starts no threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.frame_checks import check_gradients, check_ids
from parameter_server.lane_order import CLIENT_LANES
from parameter_server.marks import ELSEWHERE, FROZEN, HERE, Places, check_places
from parameter_server.partition import Routes
from parameter_server.row_storage import answer_storage, check_storage
from parameter_server.shard_counts import STALENESS_BINS, ShardCounts
from parameter_server.shard_state import ShardState
from parameter_server.wire import (
    DTYPES,
    MAX_MESSAGE_BYTES,
    Flag,
    Frame,
    Header,
    Op,
    Type,
    decode,
    encode,
    frame_bytes,
)

Parts = list[bytes | memoryview]
JournalSync = Literal["group", "none"]
_MAX_CLOCK = 1 << 40
_RETRY_SECONDS = 0.1


class Shard:
    """The rows of one shard, behind a lock: what is applied, in what order, and whether it is kept.

    Attributes:
        description: Of the run.
        number: Of the shard, among the run's.
        counts: What it has done; ``counts.copy()`` for use beside the shard.
        failed: Why it refuses everything since some moment, or None; its process should end and say so.
    """

    def __init__(
        self,
        description: RunDescription,
        number: int,
        *,
        folder: Path | None = None,
        journal_sync: JournalSync = "group",
    ) -> None:
        self.description = description
        self.number = number
        self.failed: str | None = None
        self.counts = ShardCounts(staleness=np.zeros((len(description.tables), STALENESS_BINS), np.int64))
        self._lock = threading.Lock()
        self._routes: Routes | None = None
        self._places: Places = np.full(NUM_BUCKETS, ELSEWHERE, np.uint8)
        self._state = ShardState(description)

    @property
    def versions(self) -> list[int]:
        """Of each table, how often it has been changed."""
        return self._state.versions

    @property
    def num_rows(self) -> list[int]:
        """Of each table, rows here."""
        return [table.num_rows for table in self._state.tables]

    @property
    def num_bytes(self) -> int:
        """Of all tables, in memory."""
        return sum(table.num_bytes for table in self._state.tables)

    def pull(self, message: bytes) -> Parts:
        """Answers PULL frames with a frame of values each; rows that do not exist as they would be born.

        Raises:
            RefusedError: It is no such message, or a row is elsewhere.
        """
        frames = decode(message)
        length = sum(self._check_pull(frame) for frame in frames)
        if length > MAX_MESSAGE_BYTES:
            raise _wrong(f"expected at most {MAX_MESSAGE_BYTES} bytes of rows asked for at a time, got {length}")
        answers = [np.empty((f.header.n, f.header.dim), DTYPES[Type(f.header.type)]) for f in frames]
        versions = []
        with self._busy():
            for frame, out in zip(frames, answers, strict=True):
                check_places(frame.ids, self._state.salts[frame.header.table], self._places)
                table = self._state.tables[frame.header.table]
                if out.size:
                    table.pull(frame.ids, out)
                versions.append(table.version)
            self.counts.pulls += len(frames)
            self.counts.pulled_rows += sum(len(out) for out in answers)
            self.counts.pulled_bytes += length
        parts: Parts = []
        for frame, out, version in zip(frames, answers, versions, strict=True):
            parts += encode(self._answer(frame.header, version), values=out if out.size else None)
        return parts

    def push(self, message: bytes) -> Parts:
        """Applies PUSH frames in their order, and answers each with a header, once they are kept as was promised.

        Where a frame after the first is refused, the answer ends before it: what comes before is applied and kept.

        Raises:
            RefusedError: The first frame is refused, or the message is none; nothing of it has been applied.
        """
        frames = decode(message)
        for frame in frames:
            self._check_push(frame)
        parts: Parts = []
        with self._busy():
            now = time.time()
            for frame in frames:
                try:
                    parts += self._push_frame(frame, now)
                except RefusedError:
                    self.counts.refused += 1
                    if not parts:
                        raise
                    break
        return parts

    def push_pull_dense(self, message: bytes) -> Parts:
        """Exchanges pieces of the dense part.

        Raises:
            RefusedError: Always, for now.
        """
        raise _wrong("expected a shard with dense pieces, got one without")

    def store(self, message: bytes) -> Parts:
        """Reads or overwrites whole rows, see ``row_storage``; what is written is kept by the next snapshot.

        Raises:
            RefusedError: It is no such message, or a row is elsewhere.
        """
        frames = decode(message)
        check_storage(frames, self.description)
        with self._busy():
            return answer_storage(frames, self._state, self._places)

    def set_routes(self, routes: Routes) -> None:
        """Takes over newer routes: buckets that are not this shard's are refused from now on.

        What it holds of them stays until ``drop_buckets``. Routes older than those known change nothing.
        """
        with self._busy():
            if self._routes is not None and routes.epoch < self._routes.epoch:
                return
            self._routes = routes
            mine = routes.owned_by(self.number)
            frozen = mine & (self._places == FROZEN)
            self._places = np.where(frozen, FROZEN, np.where(mine, HERE, ELSEWHERE)).astype(np.uint8)
            self._state.claims[mine & (self._state.claims == 0)] = max(1, routes.epoch)

    def freeze(self, buckets: NDArray[np.bool_]) -> None:
        """Refuses pushes to some buckets [4096] of this shard for a moment; pulls go on."""
        with self._busy():
            self._places[buckets & (self._places == HERE)] = FROZEN

    def thaw(self, buckets: NDArray[np.bool_]) -> None:
        """Takes pushes to some buckets [4096] again."""
        with self._busy():
            self._places[buckets & (self._places == FROZEN)] = HERE

    def close(self) -> None:
        """Lets go of everything; calls are refused from now on."""
        with self._lock:
            self.failed = self.failed or "closed"

    def _push_frame(self, frame: Frame, now: float) -> Parts:
        header, state = frame.header, self._state
        if state.orders.check(header):
            self.counts.duplicates += 1
            return encode(self._answer(header, state.tables[header.table].version, Flag.DUPLICATE))
        fresh = state.find_fresh(frame, self._places)
        table = state.tables[header.table]
        self.counts.count_staleness(header.table, table.version, header.version)
        state.push(frame, fresh, now)
        self.counts.pushes += 1
        self.counts.pushed_rows += header.n - fresh.skipped
        self.counts.pushed_bytes += frame.ids.nbytes + frame.values.nbytes
        self.counts.skipped_rows += fresh.skipped
        self.counts.lane_pushes[header.lane] = state.orders.lanes[header.lane].frames
        return encode(self._answer(header, table.version))

    def _answer(self, asked: Header, version: int, flags: int = 0) -> Header:
        epoch = self._routes.epoch if self._routes else 0
        return asked._replace(flags=Flag.REPLY | flags, n=0, version=version, route_epoch=epoch)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        with self._lock:
            began = time.perf_counter()
            try:
                if self.failed is not None:
                    raise RefusedError(Refusal.DATA_LOSS, f"shard {self.number}: {self.failed}")
                yield
            finally:
                self.counts.lock_seconds += time.perf_counter() - began

    def _check_pull(self, frame: Frame) -> int:
        """Checks what can be checked without the lock; returns the length of the answer in bytes."""
        header = frame.header
        dim = self._check_head(header, Op.PULL)
        if header.dim != dim or len(frame.ids) != header.n or len(frame.values):
            raise _wrong(f"table {header.table}: expected ids of rows of {dim} numbers, got {header.dim}, or no ids")
        check_ids(frame, self.description.tables[header.table])
        return frame_bytes(header.n, header.dim, Type(header.type), has_ids=False, has_values=True)

    def _check_push(self, frame: Frame) -> None:
        header = frame.header
        dim = self._check_head(header, Op.PUSH)
        if header.n and header.dim != dim or not len(frame.ids) == len(frame.values) == header.n:
            raise _wrong(f"table {header.table}: expected ids and as many gradients of {dim} numbers, got {header}")
        if not header.lane < (lanes := self.description.lanes + CLIENT_LANES):
            raise _wrong(f"expected a lane below {lanes}, got {header.lane}")
        if not 1 <= header.clock <= _MAX_CLOCK:
            raise _wrong(f"lane {header.lane}: expected a clock from 1 to {_MAX_CLOCK}, got {header.clock}")
        if not (math.isfinite(header.factor) and math.isfinite(header.eps_factor)):
            raise _wrong(f"expected finite factors, got {header.factor} and {header.eps_factor}")
        config = self.description.tables[header.table]
        check_ids(frame, config)
        check_gradients(frame, config, self._state.salts[header.table])

    def _check_head(self, header: Header, op: Op) -> int:
        tables: Sequence[object] = self.description.tables
        if header.op != op or header.flags & (Flag.REPLY | Flag.DUPLICATE):
            raise _wrong(f"expected {op.name} frames, got op {header.op} with flags {header.flags:#x}")
        if header.run_id != self.description.run_id:
            raise _wrong(f"expected run {self.description.run_id}, got {header.run_id}: another run's server")
        if not header.table < len(tables):
            raise _wrong(f"expected a table below {len(tables)}, got {header.table}")
        if self._routes is None:
            message = f"shard {self.number}: no routes yet"
            raise RefusedError(Refusal.UNAVAILABLE, message, retry_after_seconds=_RETRY_SECONDS)
        return self.description.tables[header.table].dim


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, message)

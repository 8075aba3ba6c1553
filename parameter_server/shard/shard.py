"""A shard: the engine that answers pulls and applies pushes, each exactly once, without gRPC or threads of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.dense_codec import MAX_FRAME_PIECES
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes, buckets_of
from parameter_server.shard.bucket_chunks import take_chunks
from parameter_server.shard.changes import Changes
from parameter_server.shard.folder import SnapshotInfo
from parameter_server.shard.guarded_state import GuardedState
from parameter_server.shard.journal import JournalSync
from parameter_server.shard.marks import ELSEWHERE, FROZEN, HERE, check_places
from parameter_server.shard.merge import MergeInfo, merge_folders
from parameter_server.shard.message_checks import check_pulls, check_pushes, check_run
from parameter_server.shard.records_file import Kind
from parameter_server.shard.row_storage import answer_storage, check_storage
from parameter_server.shard.state_parts import check_part, put_part, unpack_part
from parameter_server.shard.writes import ShardWrites, answer_to, cut
from parameter_server.wire import DTYPES, Flag, Op, Type, decode, encode

Mask = NDArray[np.bool_]
Parts = list[bytes | memoryview]


class Shard:
    """The rows of one shard, behind a lock: what is applied, in what order, and whether it is kept.

    What survives is the run's ``durability``: with ``journal``, a push is in the journal before it is acknowledged;
    with ``snapshot``, it is in the next ``snapshot()``, and after a crash ``counts.lost_pushes`` says how many were
    not. That count survives a killed process, not a power cut, after which it may be too low; a journal that is synced
    (``journal_sync="group"``) loses nothing in either.

    Args:
        description: Of the run.
        number: Of the shard.
        folder: Where it is kept; what is there is read back first. None: in memory only.
        journal_sync: See ``JournalSync``.

    Attributes:
        description: Of the run.
        number: Of the shard, among the run's.
        counts: What it has done; ``counts.copy()`` for use beside the shard.
        lines: What a person should know of the start: what was passed over, cut off, or lost.

    Raises:
        ValueError: The folder is in use, or another shard's; or there is none, and the run wants a journal.
        DamagedError: The folder is damaged, and something would be lost silently.
    """

    def __init__(
        self,
        description: RunDescription,
        number: int,
        *,
        folder: Path | None = None,
        journal_sync: JournalSync = "group",
    ) -> None:
        if folder is None and description.durability == "journal":
            raise ValueError(
                "shard: expected a folder for its journal, got none; give --folder, or start the run with another "
                "--servers.durability"
            )
        self.description = description
        self.number = number
        self._guarded = GuardedState(description, number, folder, journal_sync)
        self._state = self._guarded.state
        self._writes = ShardWrites(self._guarded)
        self.counts = self._guarded.counts
        self.lines = self._guarded.lines

    @property
    def failed(self) -> str | None:
        """Why it refuses everything, or None; its process should say so, and end with an error."""
        return self._guarded.failed

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
        length = check_pulls(frames, self.description)
        answers = [np.empty((f.header.n, f.header.dim), DTYPES[Type(f.header.type)]) for f in frames]
        versions = []
        with self._guarded.busy():
            epoch = self._guarded.epoch()
            for frame, out in zip(frames, answers, strict=True):
                check_places(frame.ids, self._state.salts[frame.header.table], self._guarded.places)
                table = self._state.tables[frame.header.table]
                if out.size:
                    table.pull(frame.ids, out)
                versions.append(table.version)
            self.counts.pulls += len(frames)
            self.counts.pulled_rows += sum(len(out) for out in answers)
            self.counts.pulled_bytes += length
        parts: Parts = []
        for frame, out, version in zip(frames, answers, versions, strict=True):
            parts += encode(answer_to(frame.header, version, epoch), values=out if out.size else None)
        return parts

    def push(self, message: bytes) -> Parts:
        """Applies PUSH frames in their order, and answers each with a header, once they are kept as was promised.

        Where a frame after the first is refused, the answer ends before it: what comes before is applied and kept.

        Raises:
            RefusedError: The first frame is refused, or the message is none; nothing of it has been applied.
        """
        frames = decode(message)
        check_pushes(frames, self.description, self._state.salts)
        with self._guarded.busy():
            epoch, now = self._guarded.epoch(), time.time()
            push = partial(self._writes.push, now=now, epoch=epoch)
            parts = self._guarded.each(
                [partial(push, *each) for each in zip(frames, cut(message, frames), strict=True)]
            )
            orders, position = self._state.orders.copy_of(frames), self._guarded.written()
        self._guarded.settle(position, orders)
        return parts

    def push_pull_dense(self, message: bytes) -> Parts:
        """Exchanges pieces of the dense part; answers and refuses as ``push`` does.

        Raises:
            RefusedError: The first frame is refused, or the message is none; nothing of it has been applied.
        """
        frames = decode(message)
        for frame in frames:
            check_run(frame.header, Op.DENSE, self.description)
        if (pieces := sum(frame.ids.size for frame in frames)) > MAX_FRAME_PIECES:
            raise _wrong(f"expected at most {MAX_FRAME_PIECES} pieces of the dense part in a message, got {pieces}")
        with self._guarded.busy():
            exchange = partial(self._writes.exchange, now=time.time(), epoch=self._guarded.epoch())
            calls = [partial(exchange, *each) for each in zip(frames, cut(message, frames), strict=True)]
            parts, position = self._guarded.each(calls), self._guarded.written()
        self._guarded.settle(position)
        return parts

    def store(self, message: bytes) -> Parts:
        """Reads or overwrites whole rows, see ``row_storage``; what is written is as durable as pushes are.

        Raises:
            RefusedError: It is no such message, or a row is elsewhere.
        """
        frames = decode(message)
        check_storage(frames, self.description)
        with self._guarded.busy():
            parts = answer_storage(frames, self._state, self._guarded.places)
            if any(frame.header.flags & Flag.VALUES or frame.header.codec for frame in frames):
                self._guarded.write(Kind.STORE, time.time(), [message])
            position = self._guarded.written()
        self._guarded.settle(position)
        return parts

    def set_routes(self, routes: Routes) -> None:
        """Takes over newer routes: buckets that are not this shard's are refused from now on.

        What it holds of them stays until ``drop_buckets``. Routes older than those known change nothing.
        """
        with self._guarded.busy():
            self._guarded.set_routes(routes)

    def freeze(self, buckets: Mask) -> None:
        """Refuses pushes to some buckets [4096] of this shard for a moment; pulls go on."""
        with self._guarded.busy():
            self._guarded.places[buckets & (self._guarded.places == HERE)] = FROZEN

    def thaw(self, buckets: Mask) -> None:
        """Takes pushes to some buckets [4096] again."""
        with self._guarded.busy():
            self._guarded.places[buckets & (self._guarded.places == FROZEN)] = HERE

    def take_buckets(self, buckets: Mask, since: Sequence[int] | Mapping[int, int] = ()) -> Iterator[bytes]:
        """Gives all that lies in buckets [4096], for another shard's ``put_buckets``, in chunks of at most 4 MiB.

        A move is: ``drop_buckets`` on the other shard, of what an earlier try has left there; ``versions``; a pass
        while pushes go on; ``freeze``; a pass since these versions; new routes on all
        shards; ``drop_buckets`` here. In mode ``snapshot`` the other shard takes a snapshot before the drop, so that
        some shard's folder holds the rows whatever happens.

        Args:
            buckets: Which.
            since: Versions of the tables, after which rows are wanted; by default all rows.
        """
        tables = len(self.description.tables)
        versions = [since.get(t, 0) for t in range(tables)] if isinstance(since, Mapping) else since or [0] * tables
        return take_chunks(self._state, self._guarded.busy, buckets, versions)

    def put_buckets(self, buckets: Mask, chunks: Iterable[bytes], *, is_last: bool) -> None:
        """Takes over chunks of other shards' buckets [4096].

        Args:
            buckets: All that are moving.
            chunks: In their order; of one pass or of several, in one call or in many.
            is_last: Whether buckets are whole here with these chunks. This shard's folder is the one that counts for
                them once routes say that they are here; until then, only where no other shard's does.

        Raises:
            RefusedError: A chunk is damaged; those before it are taken over.
        """
        for chunk in chunks:
            part = unpack_part(chunk)
            with self._guarded.busy():
                check_part(self._state, part)
                put_part(self._state, part, restamp=True)
                self._guarded.write(Kind.PUT, time.time(), [chunk])
        with self._guarded.busy():
            if is_last:
                self._guarded.claim(buckets, -(self._guarded.epoch() + 1))
            position = self._guarded.written()
        self._guarded.settle(position)

    def drop_buckets(self, buckets: Mask) -> None:
        """Forgets all that lies in buckets [4096]: they are whole on another shard, or a move to here was given up.

        Raises:
            RefusedError: The routes say that some are this shard's.
        """
        with self._guarded.busy():
            if (self._guarded.places[buckets] != ELSEWHERE).any():
                raise _wrong("expected buckets that routes place elsewhere, got some that are this shard's")
            self._state.drop(buckets)
            self._guarded.write(Kind.DROP, time.time(), [np.ascontiguousarray(buckets).data.cast("B")])
            position = self._guarded.written()
        self._guarded.settle(position)

    def changes(self, table: int, since: int, buckets: Mask | None) -> Changes:
        """Says which rows of a table have changed, for the serving feed; see ``ChangesSource``."""
        with self._guarded.busy():
            owned = self._guarded.places != ELSEWHERE
            wanted = np.zeros(NUM_BUCKETS, np.bool_) if buckets is None else buckets & owned
            rows, salt = self._state.tables[table], self._state.salts[table]
            ids = rows.list_ids(buckets=wanted, since=since)
            weights = np.empty((ids.size, rows.config.dim), np.float32)
            rows.pull(ids, weights)
            evicted = rows.evicted(since=since)
            return Changes(
                version=rows.version,
                route_epoch=self._guarded.epoch(),
                claims=np.where(owned, self._state.claims, 0),
                num_rows=rows.num_rows,
                ids=ids,
                weights=weights,
                evicted=evicted[wanted[buckets_of(evicted, salt)]],
                evictions_since=rows.evictions_since,
            )

    def evict(self, now: float | None = None) -> int:
        """Evicts rows that are too old by now (seconds since 1970); to be called every so often. Returns how many."""
        with self._guarded.busy():
            now = time.time() if now is None else now
            before, count = self._state.versions, self._state.evict(now)
            self.counts.evicted_rows += count
            if self._state.versions != before:  # rows went, or were dated, or what was only counted is forgotten
                self._guarded.write(Kind.EVICT, now, [])
            self._guarded.forget_evicted(now)
        return count

    def snapshot(self) -> SnapshotInfo:
        """Writes what changed since the last snapshot; pushes go on but for moments. One at a time.

        Raises:
            ValueError: The shard has no folder.
            RefusedError: It could not be written, and the shard refuses everything from now on.
        """
        return self._guarded.save()

    def restore_from(self, folders: Sequence[Path], buckets: Mask) -> MergeInfo:
        """Takes over buckets [4096] from the folders of a run's old shards, which have ended, however many they were.

        The shard must be new. What it takes over is in a snapshot of its own afterwards, if it has a folder.

        Raises:
            ValueError: The shard is not new, or a folder is of another run.
            DamagedError: A folder is damaged, and something would be lost silently.
            RefusedError: The snapshot could not be written.
        """
        with self._guarded.busy():
            if any(self.versions) or self._state.orders.lanes:
                raise ValueError(f"shard {self.number}: expected one without rows to restore into, got one with some")
            info = merge_folders(self._state, folders, buckets)
        if self._guarded.is_kept:
            self.snapshot()
        return info

    def close(self) -> None:
        """Lets go of everything; calls are refused from now on."""
        self._guarded.close()


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, message)

"""The journal of a shard: what was done, in order, on disk before it is acknowledged.

It is cut into segments, ``<number of the first record>.log``. A snapshot begins a new one, so that those before can go.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from parameter_server.shard.records_file import DamagedError, Kind, Record, RecordsFile, head_of
from parameter_server.shard.synced_files import sync_path

JournalSync = Literal["group", "none"]
"""``group``: acknowledged after a sync, one for all pushes that wait for it; ``none``: after the operating system has
it: a killed process loses nothing, a power cut what was not written out yet."""

SEGMENT_BYTES = 256 << 20
_sync_data = getattr(os, "fdatasync", os.fsync)


class Journal:
    """Appends records; one thread at a time appends, any number wait until theirs is kept.

    Args:
        folder: Of the segments.
        next_number: Of the next record.
        sync: See ``JournalSync``.

    Attributes:
        position: Number of the last record written.
        num_bytes: Written since the start.
        syncs: How often it was synced.
        sync_seconds: For all of these.
    """

    def __init__(self, folder: Path, next_number: int, sync: JournalSync) -> None:
        self.position = next_number - 1
        self.num_bytes = 0
        self.syncs = 0
        self.sync_seconds = 0.0
        self._folder, self._sync = folder, sync
        self._kept = self.position
        self._is_syncing = False
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._file = self._open_segment()
        self._segment_bytes = self._released_bytes = 0

    def append(self, kind: Kind, seconds: float, body: Sequence[bytes | memoryview]) -> None:
        """Writes a record; ``settle`` waits until it is kept.

        Raises:
            OSError: It could not be written; the journal must not be used any more.
        """
        if self._segment_bytes >= SEGMENT_BYTES:
            self.begin_segment()
        head = head_of(kind, self.position + 1, seconds, body)
        written = _write(self._file, [head, *body])
        self.position += 1
        self.num_bytes += written
        self._segment_bytes += written

    def settle(self, position: int) -> None:
        """Waits until the records up to a number are kept as was promised.

        Raises:
            OSError: They could not be synced; the journal must not be used any more.
        """
        if self._sync == "none":
            return
        with self._changed:
            while self._kept < position:
                if self._error is not None:
                    raise OSError(*self._error.args)
                if self._is_syncing:
                    self._changed.wait()
                else:
                    self._sync_waiting()

    def begin_segment(self) -> int:
        """Begins a new segment, with what comes before kept; returns the number of its first record.

        Raises:
            OSError: A file could not be synced or made.
        """
        with self._changed:
            while self._is_syncing:
                self._changed.wait()
            if self._error is not None:
                raise OSError(*self._error.args)
            try:
                self._change_segment()
            except OSError as error:  # synced again, Linux would say that all is well, though pages are lost
                self._error = error
                raise
            finally:
                self._changed.notify_all()
        return self.position + 1

    def remove_before(self, number: int) -> None:
        """Removes the segments whose records all come before a number."""
        segments = list_segments(self._folder)
        for segment, following in itertools.pairwise(segments):
            if _first_of(following) <= number:
                segment.unlink()

    def close(self) -> None:
        """Syncs and closes; nothing may wait any more."""
        with self._changed:
            while self._is_syncing:
                self._changed.wait()
            try:
                if self._sync == "group" and self._error is None:
                    _sync_data(self._file)
            finally:
                os.close(self._file)

    def _sync_waiting(self) -> None:
        """Syncs what is written by now, for all who wait; called with the condition held, which it lets go."""
        self._is_syncing, position, error = True, self.position, None
        length, began = self._segment_bytes, time.perf_counter()
        self._changed.release()
        try:
            _sync_data(self._file)
            self._release(length)
        except OSError as failure:
            error = failure
        finally:
            self._changed.acquire()
            self._is_syncing = False
        self.syncs += 1
        self.sync_seconds += time.perf_counter() - began
        self._error = self._error or error
        if error is None:
            self._kept = max(self._kept, position)
        self._changed.notify_all()

    def _change_segment(self) -> None:
        if self._sync == "group" and self._kept < self.position:
            _sync_data(self._file)
        self._kept = self.position
        if self._segment_bytes:
            following = self._open_segment()
            os.close(self._file)
            self._file, self._segment_bytes, self._released_bytes = following, 0, 0

    def _release(self, length: int) -> None:
        """Gives the memory in which the system holds what is synced back to it.

        Nobody reads it before a restart. What is written next takes the same pages, and so less time: a push of 2.7 MB
        costs 1.2 ms of a processor instead of 4 to 6.
        """
        if hasattr(os, "posix_fadvise"):
            start = self._released_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            os.posix_fadvise(self._file, start, length - start, os.POSIX_FADV_DONTNEED)
            self._released_bytes = length

    def _open_segment(self) -> int:
        path = self._folder / f"{self.position + 1:020d}.log"
        # A file of this name can only be one without a whole record.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        if self._sync == "group":
            sync_path(self._folder)
        return file


def read_journal(folder: Path, first: int) -> Iterator[Record | RecordsFile]:
    """Reads the records from a number on; the last may be followed by what a crash left of one never acknowledged.

    Yields:
        The records; and at last, if the tail is torn, the segment, whose ``cut`` makes it whole.

    Raises:
        DamagedError: A record is damaged, or records are missing.
    """
    segments = list_segments(folder)
    kept = [s for i, s in enumerate(segments) if i + 1 == len(segments) or _first_of(segments[i + 1]) > first]
    if not kept and first > 1:
        raise DamagedError(f"{folder}: expected records from {first} on, got none")
    number = _first_of(kept[0]) if kept else first
    if number > first:
        raise DamagedError(f"{folder}: expected records from {first} on, got those from {number} on")
    for segment in kept:
        if _first_of(segment) != number:
            raise DamagedError(
                f"{segment}: expected a segment from record {number} on; one before it is cut or missing"
            )
        records = RecordsFile(segment, number)
        for record in records:
            number = record.number + 1
            if record.number >= first:
                yield record
        if records.torn_bytes:
            if segment != kept[-1]:
                raise DamagedError(f"{segment}, byte {records.end}: expected record {number}, got a cut one")
            yield records


def list_segments(folder: Path) -> list[Path]:
    """Lists the segments in their order."""
    return sorted(folder.glob("*.log"))


def _first_of(segment: Path) -> int:
    return int(segment.stem)


def _write(file: int, pieces: Sequence[bytes | memoryview]) -> int:
    """Writes all pieces; a full disk shows as a short write first."""
    left = [memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes]
    total = 0
    while left:
        count = os.writev(file, left)
        total += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]
    return total

"""What a shard keeps on disk, and how: its folder's lock, journal, snapshots, and count of what was acknowledged."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from parameter_server.description import RunDescription
from parameter_server.folder_lock import lock_folder
from parameter_server.shard.acknowledged import AcknowledgedPushes
from parameter_server.shard.counts import ShardCounts
from parameter_server.shard.journal import Journal, JournalSync
from parameter_server.shard.replay import ACKNOWLEDGED, JOURNAL, SNAPSHOTS, count_lanes, group_buckets, read_back
from parameter_server.shard.snapshots import Snapshot, SnapshotFolder, TakenPart
from parameter_server.shard.state import ShardState, without_limits
from parameter_server.shard.state_parts import Part, put_part, row_bytes, take_ending, take_gone, take_marks, take_rows
from parameter_server.shard.synced_files import write_whole

DESCRIPTION = "shard.json"
INCREMENTS = 8  # after which snapshots are merged into a base
PART_BYTES = 64 << 20  # of rows, copied under the shard's lock at a time
_SPILL = "spill"
_OF_CHANGES = (".ids", ".records", ".evicted", "dropped")
_EVICTED_SNAPSHOTS = 8  # for which ids of evicted rows are known, to readers that come back

Busy = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """What ``Shard.snapshot`` has done.

    Attributes:
        number: Of the snapshot.
        is_base: Whether it holds everything, rather than what changed.
        bytes: On disk.
        seconds: From its beginning to its end.
        pause_seconds: The longest time for which it kept pushes waiting at a stretch.
        versions: Of the tables.
    """

    number: int
    is_base: bool
    bytes: int
    seconds: float
    pause_seconds: float
    versions: tuple[int, ...]


class ShardFolder:
    """The folder of one shard, with its state as it was when the shard ended.

    Attributes:
        state: Whoever closes the folder closes it first.
        journal: None unless the run's durability is ``journal``.
        acknowledged: Pushes.
        lines: What a person should know of the start: what was passed over, cut off, or lost.

    Raises:
        ValueError: Another process uses the folder, or it is of another run or shard.
        DamagedError: Nothing can go on from what is there without losing something silently.
    """

    def __init__(
        self, folder: Path, description: RunDescription, number: int, sync: JournalSync, counts: ShardCounts
    ) -> None:
        self._lock = lock_folder(folder)
        self._folder, self._counts = folder, counts
        self.journal: Journal | None = None
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            check_description(folder, description, number)
            self.state = ShardState(description, folder / _SPILL)  # empties it, which others must not be using
            undo.callback(self.state.close)
            self._open(sync)
            undo.pop_all()
        self._evicted_before: deque[list[int]] = deque(maxlen=_EVICTED_SNAPSHOTS)

    def save(self, busy: Busy) -> SnapshotInfo:
        """Writes a snapshot; ``busy`` takes the shard's lock for moments.

        Raises:
            OSError: It could not be written.
        """
        began, pauses = time.perf_counter(), _Pauses(busy)
        written = self._snapshots.write(self._take(pauses))
        versions = self._saved
        if self.journal is not None:
            self.journal.remove_before(written.journal)
        if sum(not snapshot.is_base for snapshot in self._snapshots.chain) >= INCREMENTS:
            written = self._merge(written)
        self._snapshots.remove_others()
        self._forget_evicted(busy)
        seconds = time.perf_counter() - began
        self._counts.snapshots += 1
        self._counts.snapshot_seconds = seconds
        self._counts.snapshot_pause_seconds = pauses.longest
        self._counts.longest_pause_seconds = max(pauses.longest, self._counts.longest_pause_seconds)
        return SnapshotInfo(
            number=written.number,
            is_base=written.is_base,
            bytes=written.bytes,
            seconds=seconds,
            pause_seconds=pauses.longest,
            versions=tuple(versions),
        )

    def close(self) -> None:
        """Closes all files, and lets others have the folder."""
        if self.journal is not None:
            self.journal.close()
        self.acknowledged.close()
        self._lock.release()

    def _open(self, sync: JournalSync) -> None:
        state, folder = self.state, self._folder
        self._snapshots = SnapshotFolder(folder / SNAPSHOTS)
        (folder / JOURNAL).mkdir(exist_ok=True)
        found = read_back(folder, state, self._snapshots)
        if found.torn is not None:
            found.torn.cut()
            self._counts.torn_bytes = found.torn.torn_bytes
        if state.lost:
            found.lines.append(f"{folder}: {state.lost} pushes that were acknowledged are lost, all told")
        self.lines = found.lines
        self._saved = found.saved
        self._counts.replayed = found.replayed
        self._counts.lost_pushes = state.lost
        if state.description.durability == "journal":
            self.journal = Journal(folder / JOURNAL, found.next_record, sync)
        self.acknowledged = AcknowledgedPushes(folder / ACKNOWLEDGED, count_lanes(state.description))

    def _take(self, pauses: _Pauses) -> Iterator[TakenPart]:
        """Takes what changed since the last snapshot, under the lock.

        Much of it is taken some buckets at a time, with pushes in between; what these change is taken again at the
        end, at the moment of which the snapshot is.
        """
        state, since = self.state, self._saved
        groups = 1 + sum(map(row_bytes, state.tables)) // PART_BYTES
        if groups > 1:
            with pauses:
                part, versions = take_gone(state, since), state.versions
            yield TakenPart(part)
            for buckets in group_buckets(groups):
                part = {}
                for number in range(len(state.tables)):
                    with pauses:
                        part |= take_rows(state, number, since[number], buckets)
                if part:
                    yield TakenPart(part, buckets=buckets)
            since = versions
        if self.journal is not None:  # so that little is left to wait for under the lock
            self.journal.settle(self.journal.position)
        with pauses:
            part = take_gone(state, since)
            for number in range(len(state.tables)):
                part |= take_rows(state, number, since[number])
            part |= take_ending(state)
            first_record = 0 if self.journal is None else self.journal.begin_segment()
            self._saved = state.versions
        yield TakenPart(part, first_record)

    def _merge(self, newest: Snapshot) -> Snapshot:
        """Writes all snapshots as one, some buckets at a time, from files."""
        groups = 1 + sum(snapshot.bytes for snapshot in self._snapshots.chain) // PART_BYTES
        return self._snapshots.replace_all(_merge_parts(self.state.description, self._snapshots.chain, groups))

    def _forget_evicted(self, busy: Busy) -> None:
        """Forgets what was evicted long ago; snapshots know it, readers that come back later must read all anew."""
        if len(self._evicted_before) == _EVICTED_SNAPSHOTS:
            with busy():
                for table, version in zip(self.state.tables, self._evicted_before[0], strict=True):
                    table.forget_evicted(version)
        self._evicted_before.append(list(self._saved))


class _Pauses:
    """Takes the shard's lock, and remembers for how long."""

    def __init__(self, busy: Busy) -> None:
        self._busy = busy
        self.longest = 0.0

    def __enter__(self) -> None:
        self._held = self._busy()
        self._held.__enter__()
        self._began = time.perf_counter()

    def __exit__(self, *failure: object) -> None:
        self.longest = max(self.longest, time.perf_counter() - self._began)
        self._held.__exit__(None, None, None)


def check_description(folder: Path, description: RunDescription, number: int | None) -> None:
    """Checks that a shard's folder is of a run, and of the shard if one is named; writes so into a new one.

    Raises:
        ValueError: It is not.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        if number is None:
            raise ValueError(f"{folder}: expected a shard's folder, got one without {DESCRIPTION}")
        content = {"number": number, "description": description.to_json()}
        write_whole(path, json.dumps(content) + "\n")
        return
    owner, known = _read_description(path)
    if known.run_id != description.run_id or number not in (None, owner):
        raise ValueError(
            f"{folder}: expected the folder of run {description.run_id}, shard {number}, "
            f"got that of run {known.run_id}, shard {owner}"
        )
    fixed = ("seed", "tables", "lanes", "durability", "dense")
    if different := [name for name in known.differences(description) if name in fixed]:
        raise ValueError(f"{folder}: expected the run's {different[0]} to be as when the folder was made, got another")


def _read_description(path: Path) -> tuple[int, RunDescription]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["number"]), RunDescription.from_json(content["description"])
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}: expected the number and run of a shard, got {reason}") from error


def _merge_parts(description: RunDescription, chain: Sequence[Snapshot], groups: int) -> Iterator[TakenPart]:
    ending: Part = {}
    for buckets in group_buckets(groups):
        state = ShardState(without_limits(description))
        for snapshot in chain:
            for part in snapshot.parts(buckets):
                put_part(state, {name: array for name, array in part.items() if not name.startswith("dense.")}, buckets)
                ending = part if "orders" in part else ending
        merged = take_marks(state, sorted(state.marks.lanes), buckets)
        for number in range(len(state.tables)):
            merged |= take_rows(state, number, 0)
        if merged:
            yield TakenPart(merged, buckets=buckets)
    yield TakenPart({name: array for name, array in ending.items() if not name.endswith(_OF_CHANGES)})

"""The coordinator's memory in SQLite, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parameter_server.errors import Refusal, RefusedError

_VERSION = 1
_TABLES = """
create table settings (key text primary key, value text not null);
create table members (number integer primary key autoincrement, role text, name text, address text, shard integer);
create table shards (number integer primary key, name text unique, address text, state text);
create table routes (one integer primary key check (one = 1), epoch integer, owners blob);
create table lanes (lane integer primary key, lease integer, completed integer, handed integer, holder integer);
create table client_lanes
  (lane integer primary key, lease integer, next_clock integer, holder integer, retired integer);
create table snapshots (name text primary key, time real, position text, finished integer);
"""


class StoredMember(NamedTuple):
    """A row of ``members``; it goes when the member leaves or its lease expires."""

    number: int
    role: str
    name: str
    address: str
    shard: int | None


class StoredShard(NamedTuple):
    """A row of ``shards``; ``state`` is ``active``, ``draining`` or ``drained``."""

    number: int
    name: str
    address: str
    state: str


class StoredLane(NamedTuple):
    """A row of ``lanes``: of its chunks, the first ``completed`` are done and ``holder`` has those to ``handed``."""

    lane: int
    lease: int
    completed: int
    handed: int
    holder: int  # a member, or 0


class StoredClientLane(NamedTuple):
    """A row of ``client_lanes``; a retired one is never handed out again, as its last clock is not known."""

    lane: int
    lease: int
    next_clock: int
    holder: int  # a member, or 0
    retired: bool


class StoredSnapshot(NamedTuple):
    """A row of ``snapshots``; ``position`` has the completed chunks of each lane."""

    name: str
    time: float
    position: tuple[int, ...]
    finished: bool


class CoordinatorState:
    """Reads and writes the file; callers hold a lock of their own, and write within ``change``.

    Every change is on disk when ``change`` ends (WAL with synchronous=FULL), as answers that follow it are promises:
    a lease number once given is never given again, not even after a power cut.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens the file, or makes one; None keeps everything in memory."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = str(path) if path is not None else ":memory:"
        self._open = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._open.close()
            raise

    def _prepare(self) -> None:
        with _told(self._file):
            self._open.execute("pragma busy_timeout = 2000")
            (version,) = self._open.execute("pragma user_version").fetchone()
            (tables,) = self._open.execute("select count(*) from sqlite_master").fetchone()
            if version != _VERSION and (version or tables):  # before anything is written
                raise ValueError(f"{self._file}: expected version {_VERSION} of a coordinator's state, got {version}")
            self._open.execute("pragma journal_mode = wal")
            self._open.execute("pragma synchronous = full")
            if version == 0:
                self._open.executescript(f"begin; {_TABLES} pragma user_version = {_VERSION}; commit;")
            # A second coordinator on the same file would hand out the same leases.
            self._open.execute("pragma locking_mode = exclusive")
            self._open.execute("begin immediate")
            self._open.execute("insert or replace into settings values ('opened', 'yes')")
            self._open.execute("commit")

    @contextmanager
    def change(self) -> Iterator[None]:
        """Makes the writes within it one: all are on disk afterwards, or none.

        Raises:
            RefusedError: With DATA_LOSS: the disk is full or broken; nothing has changed.
        """
        with _told(self._file):
            self._open.execute("begin immediate")
            try:
                yield
                self._open.execute("commit")
            except BaseException:
                if self._open.in_transaction:
                    self._open.execute("rollback")
                raise

    def close(self) -> None:
        """Closes the file."""
        self._open.close()

    def setting(self, key: str) -> str | None:
        """Reads a setting."""
        rows = self._read("select value from settings where key = ?", key)
        return str(rows[0][0]) if rows else None

    def set_setting(self, key: str, value: str) -> None:
        """Writes a setting."""
        self._open.execute("insert or replace into settings values (?, ?)", (key, value))

    def members(self) -> list[StoredMember]:
        """Gives the members that have neither left nor expired."""
        return [StoredMember(*row) for row in self._read("select * from members order by number")]

    def add_member(self, role: str, name: str, address: str, shard: int | None) -> int:
        """Adds a member, and gives its number: larger than all given before."""
        sql = "insert into members (role, name, address, shard) values (?, ?, ?, ?)"
        return int(self._open.execute(sql, (role, name, address, shard)).lastrowid or 0)

    def remove_member(self, number: int) -> None:
        """Forgets a member."""
        self._open.execute("delete from members where number = ?", (number,))

    def shards(self) -> list[StoredShard]:
        """Gives all shards that there ever were."""
        return [StoredShard(*row) for row in self._read("select * from shards order by number")]

    def put_shard(self, shard: StoredShard) -> None:
        """Adds or overwrites a shard."""
        self._open.execute("insert or replace into shards values (?, ?, ?, ?)", shard)

    def routes(self) -> tuple[int, NDArray[np.int32]] | None:
        """Gives epoch and owners [4096]; None before there are any."""
        rows = self._read("select epoch, owners from routes")
        return (int(rows[0][0]), np.frombuffer(rows[0][1], "<i4").astype(np.int32)) if rows else None

    def put_routes(self, epoch: int, owners: NDArray[np.int32]) -> None:
        """Overwrites the routes: the commit of every move."""
        blob = owners.astype("<i4").tobytes()
        self._open.execute("insert or replace into routes values (1, ?, ?)", (epoch, blob))

    def remove_routes(self) -> None:
        """Forgets the routes."""
        self._open.execute("delete from routes")

    def lanes(self) -> list[StoredLane]:
        """Gives the lanes that have been written."""
        return [StoredLane(*row) for row in self._read("select * from lanes")]

    def put_lane(self, lane: StoredLane) -> None:
        """Overwrites a lane."""
        self._open.execute("insert or replace into lanes values (?, ?, ?, ?, ?)", lane)

    def client_lanes(self) -> list[StoredClientLane]:
        """Gives the clients' lanes."""
        rows = self._read("select * from client_lanes order by lane")
        return [StoredClientLane(row[0], row[1], row[2], row[3], bool(row[4])) for row in rows]

    def put_client_lane(self, lane: StoredClientLane) -> None:
        """Overwrites a client's lane."""
        self._open.execute("insert or replace into client_lanes values (?, ?, ?, ?, ?)", lane)

    def snapshots(self) -> list[StoredSnapshot]:
        """Gives the snapshots, oldest first."""
        rows = self._read("select * from snapshots order by time, rowid")
        return [StoredSnapshot(row[0], row[1], tuple(json.loads(row[2])), bool(row[3])) for row in rows]

    def put_snapshot(self, snapshot: StoredSnapshot) -> None:
        """Adds or overwrites a snapshot."""
        row = (snapshot.name, snapshot.time, json.dumps(snapshot.position), int(snapshot.finished))
        self._open.execute("insert or replace into snapshots values (?, ?, ?, ?)", row)

    def remove_snapshot(self, name: str) -> None:
        """Forgets a snapshot."""
        self._open.execute("delete from snapshots where name = ?", (name,))

    def _read(self, sql: str, *values: str) -> list[Any]:
        with _told(self._file):
            return self._open.execute(sql, values).fetchall()


@contextmanager
def _told(file: str) -> Iterator[None]:
    """Turns SQLite's errors into one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise ValueError(f"{file}: expected no other coordinator on this state, but one has it open") from error
        raise RefusedError(
            Refusal.DATA_LOSS, f"{file}: expected to read and write the coordinator's state, got {error}"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{file}: expected the state of a coordinator, got {error}") from error

"""What the coordinator of a run knows, the lock around it, and how it changes: on disk first, or not at all."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from parameter_server.coordinator.answers import Role
from parameter_server.coordinator.chunk_queue import ChunkQueue
from parameter_server.coordinator.chunks import ChunkPlan
from parameter_server.coordinator.client_lanes import ClientLanes
from parameter_server.coordinator.gate import Gate
from parameter_server.coordinator.leases import Member, Members
from parameter_server.coordinator.route_table import RouteTable
from parameter_server.coordinator.run_figures import RunFigures
from parameter_server.coordinator.state import CoordinatorState
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # at which a waiting call looks for leases that expired


class RunState:
    """The state of a run, without threads of its own.

    Args:
        description: Of the run. None: that of an earlier start, or else of the first member that brings one.
        path: Of the SQLite file; None keeps the state in memory.
        start_shards: How many shards have to register before buckets are given to them.
        lease_seconds: How long a member may be silent.
        clock: Gives seconds that never go back, for leases.

    Raises:
        ValueError: When the file is of another run, of another release, or open elsewhere.

    Attributes:
        changed: Guards everything here, and tells those who wait of changes.
        members: Who is alive.
        routing: Who holds which rows.
        queue: Who holds which data; None until the run is described.
        client_lanes: As ``queue``.
        gate_keeper: How far trainers are.
        figures: Of moves and leases; for people.
        start_number: How often a coordinator of this state has been started.
        failed: Why something could not be written, or None; its process should say so, and end with an error.
    """

    def __init__(
        self,
        description: RunDescription | None = None,
        *,
        path: Path | None = None,
        start_shards: int = 1,
        lease_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if start_shards < 1:
            raise ValueError(f"start_shards: expected at least 1, got {start_shards}")
        if not lease_seconds > 0:
            raise ValueError(f"lease_seconds: expected a number above 0, got {lease_seconds}")
        self.state = CoordinatorState(path)
        self.changed = threading.Condition()
        self.members = Members(lease_seconds=lease_seconds, clock=clock)
        self.gate_keeper = Gate(None)
        self.queue: ChunkQueue | None = None
        self.client_lanes: ClientLanes | None = None
        self.figures = RunFigures()
        self.failed: str | None = None
        self._closed = False
        try:
            self.routing = RouteTable(self.state, start_shards=start_shards)
            stored = self.state.setting("description")
            if stored is not None:
                self._use(RunDescription.from_json(stored))
            if description is not None:
                self._describe(description)
            self._go_on()
            self.start_number = int(self.state.setting("starts") or 0) + 1
            with self.state.change():
                self.state.set_setting("starts", str(self.start_number))
                for snapshot in self.state.snapshots():
                    if not snapshot.finished:  # nobody is writing it any more
                        self.state.remove_snapshot(snapshot.name)
        except BaseException:
            self.state.close()
            raise

    def close(self) -> None:
        """Ends waiting calls and closes the file."""
        with self.changed:
            if not self._closed:
                self._closed = True
                self.changed.notify_all()
                self.state.close()

    @property
    def description(self) -> RunDescription | None:
        """The run's, once there is one."""
        return self._description if self.queue is not None else None

    def _go_on(self) -> None:
        """Takes up the members of an earlier start: each has a whole lease to be heard of."""
        for stored in self.state.members():
            role: Role = stored.role  # type: ignore[assignment]  # written by register
            self.members.add(stored.number, role, stored.name, stored.address, stored.shard)

    def _remove(self, member: Member, clocks: Mapping[int, int]) -> None:
        with self._change():
            self.state.remove_member(member.number)
            if self.queue is not None and self.client_lanes is not None:
                self.queue.release(member.number)
                self.client_lanes.release(member.number, clocks)
        self.gate_keeper.leave(member.number)
        self.members.remove(member.number)
        self.changed.notify_all()

    def _describe(self, given: RunDescription) -> None:
        """Takes a description as the run's, or compares it to the run's.

        Raises:
            RefusedError: With FAILED_PRECONDITION: it is another run.
        """
        if self.queue is None:
            named = given if given.run_id else replace(given, run_id=secrets.randbits(63) | 1)
            ChunkPlan(named)  # before it is written
            with self.state.change():
                self.state.set_setting("description", named.to_json())
            self._use(named)
        elif different := self._description.differences(given):
            ours, theirs = (getattr(it, different[0]) for it in (self._description, given))
            raise RefusedError(
                Refusal.FAILED_PRECONDITION,
                f"run description: expected that of this run, got another {', '.join(different)} "
                f"({_short(ours)} here, {_short(theirs)} there); start a new run in an empty folder to change it",
            )

    def _use(self, description: RunDescription) -> None:
        plan = ChunkPlan(description)
        self._description = description
        self.client_lanes = ClientLanes(description.lanes, self.state)
        self.gate_keeper = Gate(description.staleness)
        self.queue = ChunkQueue(plan, self.state)

    def _queue(self) -> ChunkQueue:
        if self.queue is None:
            raise RefusedError(Refusal.FAILED_PRECONDITION, "run: expected its description first, got none so far")
        return self.queue

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self.changed:
            if self._closed:
                raise RefusedError(Refusal.UNAVAILABLE, "coordinator: expected it to run, but it is ending")
            self._expire()
            yield

    @contextmanager
    def _change(self) -> Iterator[None]:
        try:
            with self.state.change():
                yield
        except BaseException as error:
            if isinstance(error, RefusedError) and error.refusal is Refusal.DATA_LOSS:
                self.failed = str(error)
            self.routing.reload()
            if self.queue is not None and self.client_lanes is not None:
                self.queue.reload()
                self.client_lanes.reload()
            raise

    def _expire(self) -> None:
        for member in self.members.expired():
            silent = self.members.seconds_since_heard(member)
            _log.warning("%s %s (member %d): silent for %.1f s", member.role, member.name, member.number, silent)
            self._remove(member, {})
            self.figures.expired_leases += 1

    def _wait(self, is_ready: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not is_ready():
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.changed.wait(min(left, _LOOK_SECONDS))
            if self._closed:
                raise RefusedError(Refusal.UNAVAILABLE, "coordinator: expected it to run, but it is ending")
            self._expire()
        return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""The coordinator of a run: who takes part, who holds which rows and data, and how far everybody is.

Rows, ids and gradients never come here. While it is away, members go on with the routes and chunks that they have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from parameter_server import limits
from parameter_server.coordinator.answers import (
    PROTOCOL,
    Beat,
    Chunk,
    ClientLane,
    Finished,
    Registered,
    Role,
    SnapshotTaken,
    Status,
    Wait,
)
from parameter_server.coordinator.leases import Member
from parameter_server.coordinator.move_plan import Move
from parameter_server.coordinator.run_state import RunState
from parameter_server.coordinator.state import StoredSnapshot
from parameter_server.coordinator.status import summarize
from parameter_server.errors import Refusal, RefusedError, wrong
from parameter_server.partition import Routes

_log = logging.getLogger(__name__)
_SNAPSHOTS = 100  # whose positions are kept


class Coordinator(RunState):
    """The calls of members and people, without gRPC; any thread may make them.

    Each call of a member renews its lease. Calls that wait take ``wait_seconds`` and answer "not yet" afterwards.
    """

    def register(
        self,
        role: Role,
        name: str,
        address: str = "",
        description_json: str | None = None,
        *,
        former: int = 0,
        protocol: tuple[int, int] = PROTOCOL,
    ) -> Registered:
        """Makes somebody a member.

        Args:
            role: See ``Role``.
            name: For people; of a shard, what it is known by when it comes back: the same name, the same number.
            address: Of a shard, where it serves: ``host:port``, ``unix:/path`` or ``local:<n>``.
            description_json: What the member takes the run to be; the first one becomes that of the run.
            former: Of one that was not heard of in time: its number before.
            protocol: Major and minor version that the member speaks.

        Raises:
            RefusedError: FAILED_PRECONDITION: another major version, or another run; or a shard's name was taken over
                by another process. INVALID_ARGUMENT: not a role or a description, or something is too long.
        """
        if protocol[0] != PROTOCOL[0]:
            raise RefusedError(
                Refusal.FAILED_PRECONDITION,
                f"protocol: expected major version {PROTOCOL[0]} (the coordinator speaks {PROTOCOL[0]}.{PROTOCOL[1]}), "
                f"got {protocol[0]}.{protocol[1]}; run one release of recforge everywhere",
            )
        limits.check_member(role, name, address)
        described = limits.read_description(description_json)
        with self._locked():
            if len(self.members.all()) >= limits.MAX_MEMBERS:
                raise RefusedError(
                    Refusal.RESOURCE_EXHAUSTED, f"members: expected at most {limits.MAX_MEMBERS} at a time, got another"
                )
            if described is not None:
                self._describe(described)
            shard, replaced = None, None
            with self._change():
                if role == "shard":
                    shard = self.routing.add_shard(name, address)
                    if (replaced := self.members.shard(shard)) is not None:
                        _check_successor(former, address, replaced)
                        self.state.remove_member(replaced.number)
                number = self.state.add_member(role, name, address, shard)
            if replaced is not None:
                self.members.remove(replaced.number)
            self.members.add(number, role, name, address, shard)
            self.changed.notify_all()
            _log.info("%s %s registered as member %d", role, name, number)
            text = self._description.to_json() if self.queue is not None else None
            return Registered(number, self.members.lease_seconds, text, self.routing.routes, shard)

    def heartbeat(self, member: int, facts: Mapping[str, float] | None = None) -> Beat:
        """Notes that a member is alive, and what it tells of itself.

        Args:
            member: Its number.
            facts: Numbers for people, by name. Of these, ``route_epoch`` says which routes the member uses; shards tell
                ``rows``, ``bytes`` and ``lost_pushes``.
        """
        facts = dict(limits.check_facts(facts or {}))
        with self._locked():
            epoch = self.routing.epoch
            if (found := self.members.renew(member)) is None:
                return Beat(known=False, route_epoch=epoch, may_end=False)
            used = int(facts.pop("route_epoch", found.route_epoch))
            if used != found.route_epoch:
                found.route_epoch = used
                self.changed.notify_all()
            found.facts = facts
            return Beat(known=True, route_epoch=epoch, may_end=self._may_end(found))

    def leave(self, member: int, clocks: Mapping[int, int] | None = None) -> None:
        """Ends a membership; what it held goes to others at once. To say it twice changes nothing.

        Args:
            member: Its number.
            clocks: Of the client lanes that it holds, the last clock that it used; other lanes are not used again.
        """
        clocks = {lane: limits.check_clock(clock) for lane, clock in (clocks or {}).items()}
        with self._locked():
            if (found := self.members.renew(member)) is not None:
                self._remove(found, clocks)
                _log.info("%s %s left (member %d)", found.role, found.name, member)

    def describe(self, *, wait_seconds: float = 0.0) -> str | None:
        """Gives the run's description, or None where nobody has brought one within ``wait_seconds``."""
        with self._locked():
            self._wait(lambda: self.queue is not None, wait_seconds)
            return self._description.to_json() if self.queue is not None else None

    def routes(self, newer_than: int = 0, *, wait_seconds: float = 0.0) -> Routes | None:
        """Gives the routes, or None where there are none newer than an epoch within ``wait_seconds``."""
        with self._locked():
            self._wait(lambda: self.routing.epoch > newer_than, wait_seconds)
            return self.routing.routes if self.routing.epoch > newer_than else None

    def next_chunk(self, member: int, holding: Iterable[int] | None = None) -> Chunk | Wait | Finished:
        """Gives a trainer data; see ``ChunkQueue.next``.

        Raises:
            RefusedError: With FAILED_PRECONDITION: its lease has expired, or nobody has described the run.
        """
        with self._locked():
            self.members.require(member)
            queue = self._queue()
            with self._change():
                answer = queue.next(member, holding)
            if not isinstance(answer, Chunk) and not queue.held_by(member):
                self.gate_keeper.pause(member)
                self.changed.notify_all()
            return answer

    def complete_chunk(self, member: int, lane: int, lease: int, index: int) -> None:
        """Notes that all pushes of a chunk are acknowledged; see ``ChunkQueue.complete``."""
        with self._locked():
            self.members.require(member)
            queue = self._queue()
            with self._change():
                queue.complete(member, lane, lease, index)
            self.changed.notify_all()

    def client_lane(self, member: int) -> ClientLane:
        """Gives a member a lane for pushes by hand; see ``ClientLanes``."""
        with self._locked():
            self.members.require(member)
            self._queue()
            assert self.client_lanes is not None
            with self._change():
                return self.client_lanes.take(member)

    def gate(self, member: int, clock: int, *, wait_seconds: float = 0.0) -> bool:
        """Waits until a trainer may begin its next batch.

        Args:
            member: Its number.
            clock: How many batches it has done itself; only differences matter.
            wait_seconds: After which the answer is no; ask again.

        Raises:
            RefusedError: With FAILED_PRECONDITION: its lease has expired.
        """
        limits.check_clock(clock)
        with self._locked():
            self.members.require(member)
            self.gate_keeper.enter(member, clock)
            self.changed.notify_all()
            opened = self._wait(lambda: self.gate_keeper.is_open(member), wait_seconds)
            self.members.require(member)
            return opened

    def tick(self) -> None:
        """Looks for leases that have expired; any call does so too."""
        with self._locked():
            pass

    def begin_snapshot(self, name: str) -> None:
        """Notes the position of the data under a name: before shards are asked, so that they have all that it counts.

        Raises:
            RefusedError: INVALID_ARGUMENT: there is one of this name. FAILED_PRECONDITION: there are no routes yet.
        """
        limits.check_text("snapshot", name, limits.MAX_NAME)
        with self._locked():
            if any(snapshot.name == name for snapshot in self.state.snapshots()):
                raise wrong(f"snapshot: expected a new name, got {name!r}")
            if self.routing.routes is None:
                raise RefusedError(Refusal.FAILED_PRECONDITION, "snapshot: expected shards that hold rows, got none")
            with self._change():
                self.state.put_snapshot(StoredSnapshot(name, time.time(), self._queue().position(), False))

    def end_snapshot(self, name: str, *, finished: bool) -> SnapshotTaken | None:
        """Notes that all shards have finished a snapshot, or forgets one that failed."""
        with self._locked():
            found = next((snapshot for snapshot in self.state.snapshots() if snapshot.name == name), None)
            with self._change():
                if found is not None and finished:
                    self.state.put_snapshot(found._replace(finished=True))
                    for old in self.state.snapshots()[:-_SNAPSHOTS]:
                        self.state.remove_snapshot(old.name)
                else:
                    self.state.remove_snapshot(name)
            return SnapshotTaken(name, found.time, sum(found.position)) if found is not None and finished else None

    def restore(self, name: str) -> None:
        """Goes back to the position of a snapshot; all later chunks are handed out again.

        Shards have to be restored to the same snapshot, or a later one: they leave out what they have.

        Raises:
            RefusedError: INVALID_ARGUMENT: no finished one of this name. FAILED_PRECONDITION: trainers are at work.
        """
        with self._locked():
            found = next((it for it in self.state.snapshots() if it.name == name and it.finished), None)
            if found is None:
                raise wrong(f"restore: expected the name of a finished snapshot, got {name[:60]!r}")
            if at_work := len(self.members.of("trainer")):
                raise RefusedError(
                    Refusal.FAILED_PRECONDITION,
                    f"restore: expected no trainer, whose pushes would count as later ones, got {at_work}",
                )
            with self._change():
                self._queue().go_to(found.position)
            _log.info("went back to snapshot %s", name)

    def forget_shards(self, names: Collection[str]) -> None:
        """Forgets shards that have ended for good; see ``RouteTable.forget``.

        Raises:
            ValueError: One that holds buckets is not named.
        """
        with self._locked(), self._change():
            self.routing.forget(frozenset(names))

    def choose_shards(self, names: Sequence[str]) -> list[str]:
        """Says which shards must be started for a run to go on; see ``RouteTable.choose``."""
        with self._locked(), self._change():
            return self.routing.choose(names)

    def commit_move(self, move: Move) -> Routes:
        """Gives buckets to another shard: the one moment of a move that counts.

        Raises:
            RefusedError: With FAILED_PRECONDITION: one of the two shards has been started anew since the move began,
                so that it may not hold what was copied, or may have taken pushes; or the buckets are another's.
        """
        with self._locked():
            routes = self.routing.routes
            both = (self.members.shard(move.sender), self.members.shard(move.receiver))
            same = tuple(member.number if member else 0 for member in both) == move.members
            if not same or routes is None or not routes.owned_by(move.sender)[move.buckets].all():
                raise RefusedError(Refusal.FAILED_PRECONDITION, "move: expected both shards as it began, got others")
            owners = routes.owners.copy()
            owners[move.buckets] = move.receiver
            with self._change():
                made = self.routing.commit(owners)
            self.changed.notify_all()
            return made

    def drain(self, shard: int) -> None:
        """Has a shard emptied; it may end when its heartbeats are answered with ``may_end``.

        Raises:
            RefusedError: INVALID_ARGUMENT: no such shard. FAILED_PRECONDITION: it is the last one.
        """
        with self._locked():
            with self._change():
                self.routing.drain(shard)
            self.changed.notify_all()

    def status(self) -> Status:
        """Tells how the run goes."""
        with self._locked():
            return summarize(self)

    def _may_end(self, member: Member) -> bool:
        """Says whether a shard is drained and all living members know it, but for those that use no routes."""
        if member.shard is None or not self.routing.is_drained(member.shard):
            return False
        since = self.routing.emptied_at(member.shard)
        others = (other for other in self.members.all() if other.shard != member.shard and other.route_epoch)
        return all(other.route_epoch >= since for other in others)


def _check_successor(former: int, address: str, living: Member) -> None:
    """Checks that a shard which comes back has not been replaced meanwhile: two would serve the same rows in turn."""
    if former and living.number > former and living.address != address:  # else it is itself, and missed the answer
        raise RefusedError(
            Refusal.FAILED_PRECONDITION,
            f"shard {living.name}: expected one process of this name, got another since, at {living.address}; give "
            "each shard a --name of its own (by default that of its --folder)",
        )

"""What the coordinator answers, in process and over gRPC alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from parameter_server.partition import Routes

Role = Literal["trainer", "shard", "client"]
"""A trainer is given data and counts at the gate; a client (a notebook, a reader) does not."""

ROLES: tuple[Role, ...] = get_args(Role)
PROTOCOL = (1, 0)
"""Major and minor: another major is refused at registration; a higher minor only adds what older members ignore."""


class Registered(NamedTuple):
    """A member's place in the run.

    Attributes:
        member: Its number, which each later call names; never given twice.
        lease_seconds: Within which it has to be heard of, by heartbeat or any other call.
        description_json: Of the run; None as long as nobody has described it (a shard asks ``describe`` then).
        routes: None until as many shards have registered as the run starts with (``routes`` waits for them).
        shard: Of a shard: its number; the same name gets the same number for ever.
    """

    member: int
    lease_seconds: float
    description_json: str | None
    routes: Routes | None
    shard: int | None


class Beat(NamedTuple):
    """The answer to a heartbeat.

    Attributes:
        known: False: the lease has expired, what was held is given to others; register again.
        route_epoch: The current one, 0 before there are routes; a member that knows an older one asks for the routes.
        may_end: Of a shard that is drained: nobody uses it any longer.
    """

    known: bool
    route_epoch: int
    may_end: bool


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Data for a trainer: whole batches of ``batch_size`` samples, but for the last of an epoch, which may be smaller.

    The batches' clocks are ``first_clock``, ``first_clock + 1``, and so on.
    """

    index: int
    lane: int
    lease: int
    first_clock: int
    first_sample: int
    num_samples: int
    batch_size: int


class Wait(NamedTuple):
    """There is no chunk now, but there may be one later: others hold the rest, and may die."""

    seconds: float


class Finished(NamedTuple):
    """All chunks are complete."""


class ClientLane(NamedTuple):
    """A lane for pushes by hand, with the first clock that has not been used in it."""

    lane: int
    lease: int
    next_clock: int


class SnapshotTaken(NamedTuple):
    """A snapshot that all shards have finished.

    Attributes:
        name: By which it is restored.
        time: When it began, in seconds since 1970.
        completed_chunks: As of its beginning; a restored run hands out all others again.
    """

    name: str
    time: float
    completed_chunks: int


@dataclass(frozen=True, kw_only=True)
class MemberStatus:
    """A member as people see it; ``facts`` are what its last heartbeat told."""

    member: int
    role: Role
    name: str
    address: str
    alive: bool
    seconds_since_heard: float
    shard: int | None = None
    shard_state: str = ""
    buckets: int = 0
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run as people and programs see it.

    Attributes:
        chunks, chunks_completed, chunks_out: Of the data; ``chunks_out`` are held by trainers.
        samples, samples_completed: Of the data.
        rows, row_bytes, lost_pushes: Sums over shards of what their heartbeats told.
        snapshot_age_seconds: Since the last finished snapshot began; None without one.
        longest_freeze_seconds: For which buckets on the move have been stopped.
        expired_leases: Members that were silent for too long since the coordinator started.
        has_begun: Whether data were ever given out.
    """

    run_id: int
    route_epoch: int
    members: tuple[MemberStatus, ...]
    chunks: int
    chunks_completed: int
    chunks_out: int
    samples: int
    samples_completed: int
    rows: int
    row_bytes: int
    lost_pushes: int
    snapshots: tuple[str, ...]
    snapshot_age_seconds: float | None
    moves_done: int
    moving_buckets: int
    longest_freeze_seconds: float
    expired_leases: int = 0
    notes: tuple[str, ...] = ()
    has_begun: bool = False

    def to_plain(self) -> dict[str, Any]:
        """Gives it as JSON can hold it."""
        return asdict(self)

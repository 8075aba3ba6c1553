"""Questions to a run from the command line, and certificates for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from parameter_server.address import Address
from parameter_server.processes.config import ClientConfig, above

if TYPE_CHECKING:
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.coordinator.answers import MemberStatus, Status


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(ClientConfig):
    """A question to a run's coordinator."""

    coordinator: str
    """Address of the run's coordinator."""
    deadline_seconds: float = 5.0
    """How long to try to reach it."""

    def __post_init__(self) -> None:
        Address.parse(self.coordinator, "--coordinator")
        above(0, self.deadline_seconds, "--deadline-seconds")

    def connect(self) -> GrpcCoordinatorClient:
        """Opens a connection to the coordinator."""
        from parameter_server.control.coordinator_client import GrpcCoordinatorClient

        return GrpcCoordinatorClient(self.coordinator, self.client_security, deadline_seconds=self.deadline_seconds)


@dataclass(frozen=True, kw_only=True)
class StatusConfig(QuestionConfig):
    """How a run goes: its members, its data, its rows."""

    json: bool = False
    """Write all there is to know, as one JSON object."""


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig(QuestionConfig):
    """Has all shards save what they hold, and waits for it."""

    name: str = ""
    """Of the snapshot; by default the time."""


@dataclass(frozen=True, kw_only=True)
class DrainConfig(QuestionConfig):
    """Has a shard's rows moved to the others while training goes on; it ends by itself afterwards."""

    shard: int
    """Its number, as `recforge ps status` tells it."""


@dataclass(frozen=True, kw_only=True)
class CertificatesConfig:
    """Makes an authority, and a server's and a client's certificate of it, for tests; real ones come from elsewhere."""

    folder: Positional[Path]
    """Where new files go; nothing is overwritten."""
    host: tuple[str, ...] = ()
    """Names and numbers of the servers' machines; localhost is always among them."""
    days: float = 30.0
    """For so long they are valid."""

    def __post_init__(self) -> None:
        above(0, self.days, "--days")


def tell_status(config: StatusConfig) -> int:
    """Prints how a run goes."""
    with closing(config.connect()) as client:
        status = client.status()
    if config.json:
        print(json.dumps(status.to_plain()))
    else:
        print("\n".join(describe_status(status)))
    return 0


def take_snapshot(config: SnapshotConfig) -> int:
    """Has a snapshot taken, and prints its name."""
    with closing(config.connect()) as client:
        taken = client.snapshot(config.name)
    print(f"snapshot {taken.name}, of {taken.completed_chunks:,} chunks of data")
    return 0


def drain_shard(config: DrainConfig) -> int:
    """Has a shard emptied, and prints what will follow."""
    with closing(config.connect()) as client:
        client.drain(config.shard)
    print(f"shard {config.shard} is being emptied; its process ends when nobody uses it any longer")
    return 0


def make_certificates(config: CertificatesConfig) -> int:
    """Makes certificates, and prints what they are for."""
    from parameter_server.security.certificates import make_set

    for file in make_set(config.folder, config.host, days=config.days):
        print(file)
    folder = config.folder
    print(
        f"coordinator and shards: --tls.certificate {folder}/server.pem --tls.key {folder}/server.key "
        f"--tls.authority {folder}/authority.pem; trainers: client.pem and client.key"
    )
    return 0


def describe_status(status: Status) -> Iterator[str]:
    """Writes a run's status as people read it."""
    share = status.samples_completed / status.samples if status.samples else 0.0
    yield f"run {status.run_id}, routes {status.route_epoch}"
    yield (
        f"data: {status.samples_completed:,} of {status.samples:,} samples ({share:.1%}), "
        f"{status.chunks_out} chunks held by trainers"
    )
    yield f"rows: {status.rows:,}, {status.row_bytes / 1e6:,.1f} MB, {status.lost_pushes:,} pushes lost"
    if status.snapshots:
        yield f"last snapshot: {status.snapshots[-1]}, {status.snapshot_age_seconds or 0.0:,.0f} s ago"
    if status.moving_buckets or status.moves_done:
        yield (
            f"moves: {status.moving_buckets} buckets under way, {status.moves_done} done, longest freeze "
            f"{status.longest_freeze_seconds:.3f} s"
        )
    for member in status.members:
        yield _describe_member(member)
    yield from (f"note: {note}" for note in status.notes)


def _describe_member(member: MemberStatus) -> str:
    heard = f"heard of {member.seconds_since_heard:.1f} s ago" if member.alive else "not heard of"
    line = f"{member.role} {member.name} (member {member.member}): {heard}"
    if member.shard is not None:
        rows = member.facts.get("rows", 0.0)
        line += f", shard {member.shard} {member.shard_state}, {member.buckets} buckets, {rows:,.0f} rows"
    return f"{line}, {member.address}" if member.address else line

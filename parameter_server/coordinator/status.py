"""How a run goes, for people and programs."""

from __future__ import annotations

import time

from parameter_server.coordinator.answers import MemberStatus, Status
from parameter_server.coordinator.run_state import RunState

_LARGEST = float(1 << 62)  # of a sum that travels, whatever members tell


def summarize(run: RunState) -> Status:
    """Tells how a run goes; the caller holds the coordinator's lock."""
    members = _members(run)
    queue, description, figures = run.queue, run.description, run.figures
    finished = [snapshot for snapshot in run.state.snapshots() if snapshot.finished]
    return Status(
        run_id=description.run_id if description else 0,
        route_epoch=run.routing.epoch,
        members=members,
        chunks=queue.plan.num_chunks if queue else 0,
        chunks_completed=queue.completed if queue else 0,
        chunks_out=queue.out if queue else 0,
        samples=description.samples - description.first_sample if description else 0,
        samples_completed=queue.completed_samples if queue else 0,
        rows=_sum(members, "rows"),
        row_bytes=_sum(members, "bytes"),
        lost_pushes=_sum(members, "lost_pushes"),
        snapshots=tuple(snapshot.name for snapshot in finished),
        snapshot_age_seconds=max(0.0, time.time() - finished[-1].time) if finished else None,
        moves_done=figures.moves_done,
        moving_buckets=figures.moving_buckets,
        longest_freeze_seconds=figures.longest_freeze_seconds,
        notes=tuple(_notes(run)),
        expired_leases=figures.expired_leases,
        has_begun=queue.has_begun if queue else False,
    )


def _members(run: RunState) -> tuple[MemberStatus, ...]:
    told = []
    for member in run.members.all():
        owned = 0
        if member.shard is not None and run.routing.routes is not None:
            owned = int(run.routing.routes.owned_by(member.shard).sum())
        told.append(
            MemberStatus(
                member=member.number,
                role=member.role,
                name=member.name,
                address=member.address,
                alive=True,
                seconds_since_heard=run.members.seconds_since_heard(member),
                shard=member.shard,
                shard_state="" if member.shard is None else run.routing.shard(member.shard).state,
                buckets=owned,
                facts={"route_epoch": member.route_epoch, **member.facts},
            )
        )
    return (*told, *_missing(run))


def _missing(run: RunState) -> list[MemberStatus]:
    """Gives shards that hold buckets and are not heard of: their rows wait for them to come back."""
    if run.routing.routes is None:
        return []
    missing = []
    for shard in run.routing.shards():
        owned = int(run.routing.routes.owned_by(shard.number).sum())
        if owned and run.members.shard(shard.number) is None:
            missing.append(
                MemberStatus(
                    member=0,
                    role="shard",
                    name=shard.name,
                    address=shard.address,
                    alive=False,
                    seconds_since_heard=0.0,
                    shard=shard.number,
                    shard_state=shard.state,
                    buckets=owned,
                )
            )
    return missing


def _notes(run: RunState) -> list[str]:
    notes = [
        f"shard {member.shard} ({member.name}) is not heard of; {member.buckets} buckets wait for it"
        for member in _missing(run)
    ]
    if run.routing.routes is None:
        notes.append("waiting for shards to register")
    if run.queue is None:
        notes.append("waiting for a member that describes the run")
    if run.figures.trouble:
        notes.append(run.figures.trouble)
    return notes


def _sum(members: tuple[MemberStatus, ...], fact: str) -> int:
    told = sum(member.facts.get(fact, 0.0) for member in members if member.role == "shard")
    return int(min(max(told, 0.0), _LARGEST))

"""How a run whose processes have all ended goes on: with which shards, and from which of the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from parameter_server.coordinator.coordinator import Coordinator


@dataclass(frozen=True, kw_only=True)
class GoingOn:
    """What the coordinator's state says of a run that is to go on.

    Attributes:
        shards: Names of those that must be started: the wanted ones, and others that hold rows; these are emptied, and
            end by themselves.
        leaving: The others.
        holding: Of these, those that hold rows now, so that there must be folders.
        durability: Of the run; empty as long as nobody has described it.
        completed_chunks: Of the data.
        has_begun: Whether data were ever given out.
        snapshot: The position of the data that the run has gone back to, if it was asked to.
    """

    shards: tuple[str, ...]
    leaving: tuple[str, ...] = ()
    holding: tuple[str, ...] = ()
    durability: str = ""
    completed_chunks: int = 0
    has_begun: bool = False
    snapshot: str | None = None


def go_on(path: Path, names: Sequence[str], *, goes_back: bool = False) -> GoingOn:
    """Has a run go on with shards of some names, fewer, more, or the same; all of its processes must have ended.

    Rows move once the shards are up, as they do when one joins or is drained, while training goes on.

    Args:
        path: Of the coordinator's state; where there is none, the run is new.
        names: Of the shards that are to hold rows.
        goes_back: In durability ``snapshot``: to the data's position at the last snapshot. What shards have of later
            data they leave out when it comes again; so what a crash took is not missing.

    Raises:
        ValueError: A coordinator is running, or the file is of another release.
    """
    if not path.exists():
        return GoingOn(shards=tuple(names))
    with closing(Coordinator(path=path)) as run:
        for member in run.members.all():
            run.leave(member.number)
        description = run.description
        finished = [snapshot.name for snapshot in run.state.snapshots() if snapshot.finished]
        back_to = (
            finished[-1] if finished and goes_back and description and description.durability == "snapshot" else None
        )
        if back_to is not None:
            run.restore(back_to)
        shards = run.choose_shards(names)
        routing, routes = run.routing, run.routing.routes
        return GoingOn(
            shards=tuple(shards),
            leaving=tuple(shards[len(names) :]),
            holding=tuple(s.name for s in routing.shards() if routes is not None and routes.owned_by(s.number).any()),
            durability=description.durability if description is not None else "",
            completed_chunks=run.queue.completed if run.queue is not None else 0,
            has_begun=run.queue is not None and run.queue.has_begun,
            snapshot=back_to,
        )

"""Hands out chunks of the data so that each is computed to its end once, whoever dies on the way."""

from __future__ import annotations

from collections.abc import Iterable

from parameter_server.coordinator.answers import Chunk, Finished, Wait
from parameter_server.coordinator.chunks import ChunkPlan
from parameter_server.coordinator.state import CoordinatorState, StoredLane
from parameter_server.errors import Refusal, RefusedError

MAX_HELD = 4
"""Chunks that one trainer may hold: the one that it computes, and those that it reads ahead."""

_WAIT_SECONDS = 0.5


class ChunkQueue:
    """The lanes' positions; callers hold the coordinator's lock, and write within ``state.change()``.

    A lane belongs to whoever holds chunks of it. It becomes free when all of them are complete, or when its holder is
    released, after which the lowest chunk that is not complete is handed out again under the next lease number.

    Attributes:
        completed_samples: How many samples are in complete chunks.
    """

    def __init__(self, plan: ChunkPlan, state: CoordinatorState) -> None:
        self.plan = plan
        self._state = state
        self.reload()

    @property
    def completed(self) -> int:
        """How many chunks are complete."""
        return sum(lane.completed for lane in self._lanes)

    @property
    def has_begun(self) -> bool:
        """Whether any chunk was ever handed out."""
        return any(lane.lease for lane in self._lanes)

    @property
    def out(self) -> int:
        """How many chunks are held by trainers."""
        return sum(lane.handed - lane.completed for lane in self._lanes)

    def held_by(self, member: int) -> list[int]:
        """Gives the indices of the chunks that a member holds, ascending."""
        lanes = self.plan.lanes
        mine = (lane for lane in self._lanes if lane.holder == member)
        return sorted(lane.lane + nth * lanes for lane in mine for nth in range(lane.completed, lane.handed))

    def next(self, member: int, holding: Iterable[int] | None = None) -> Chunk | Wait | Finished:
        """Leases the lowest chunk that nobody holds, in a lane that is free or the member's own.

        As long as another member holds one of the chunks that are for one alone, there are none.

        Args:
            member: Who asks.
            holding: The chunks that it knows it holds: one that it does not name is given to it once more, since the
                answer that gave it has been lost on the way. None: all that it holds.
        """
        held = self.held_by(member)
        if holding is not None and (forgotten := sorted(set(held) - set(holding))):
            return self._chunk(forgotten[0])
        if len(held) >= MAX_HELD or self._is_another_alone(member):
            return Wait(_WAIT_SECONDS)
        offers = (self._next_of(lane) for lane in self._lanes if lane.holder in (0, member))
        index = min((offer for offer in offers if offer < self.plan.num_chunks), default=None)
        if index is None:
            return Finished() if self.completed == self.plan.num_chunks else Wait(_WAIT_SECONDS)
        lane = self._lanes[index % self.plan.lanes]
        lease = lane.lease if lane.holder == member else lane.lease + 1
        self._put(lane._replace(lease=lease, handed=lane.handed + 1, holder=member))
        return self._chunk(index)

    def complete(self, member: int, lane: int, lease: int, index: int) -> None:
        """Notes that all pushes of a chunk are acknowledged; to say it twice changes nothing.

        Raises:
            RefusedError: INVALID_ARGUMENT: no such chunk. FAILED_PRECONDITION: the lane was given to somebody else, or
                an earlier chunk of it is not complete.
        """
        stored = self._require(lane, lease)
        if not (0 <= index < self.plan.num_chunks and index % self.plan.lanes == lane):
            raise RefusedError(
                Refusal.INVALID_ARGUMENT, f"complete_chunk: expected a chunk of lane {lane}, got {index}"
            )
        nth = index // self.plan.lanes
        if nth < stored.completed:
            return
        if stored.holder != member or nth >= stored.handed:
            raise _gone(lane, lease, stored.lease)
        if nth > stored.completed:
            earlier = lane + stored.completed * self.plan.lanes
            raise RefusedError(
                Refusal.FAILED_PRECONDITION, f"complete_chunk: expected chunk {earlier} before {index} of lane {lane}"
            )
        completed = stored.completed + 1
        self._put(stored._replace(completed=completed, holder=member if completed < stored.handed else 0))
        self.completed_samples += self.plan.chunk(index).num_samples

    def release(self, member: int) -> None:
        """Takes back what a member holds: it left, or died."""
        for lane in self._lanes:
            if lane.holder == member:
                self._put(lane._replace(handed=lane.completed, holder=0))

    def position(self) -> tuple[int, ...]:
        """Gives the number of complete chunks of each lane."""
        return tuple(lane.completed for lane in self._lanes)

    def go_to(self, position: tuple[int, ...]) -> None:
        """Goes back (or on) to a position; lease numbers only grow, as shards know the old ones.

        Raises:
            ValueError: When the position is of other lanes.
        """
        if len(position) != len(self._lanes):
            raise ValueError(f"position: expected {len(self._lanes)} lanes, got {len(position)}")
        for lane, completed in zip(self._lanes, position, strict=True):
            self._put(lane._replace(lease=lane.lease + 1, completed=completed, handed=completed, holder=0))
        self._count()

    def reload(self) -> None:
        """Reads all lanes from the state: at the start, and after a change that was rolled back."""
        stored = {lane.lane: lane for lane in self._state.lanes()}
        self._lanes = [stored.get(lane, StoredLane(lane, 0, 0, 0, 0)) for lane in range(self.plan.lanes)]
        self._count()

    def _count(self) -> None:
        lanes = self.plan.lanes
        chunks = (lane.lane + nth * lanes for lane in self._lanes for nth in range(lane.completed))
        self.completed_samples = sum(self.plan.chunk(index).num_samples for index in chunks)

    def _is_another_alone(self, member: int) -> bool:
        others = (lane for lane in self._lanes if lane.holder not in (0, member))
        return any(self.plan.is_for_one(lane.lane + lane.completed * self.plan.lanes) for lane in others)

    def _require(self, lane: int, lease: int) -> StoredLane:
        if not 0 <= lane < len(self._lanes):
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"lane: expected one below {len(self._lanes)}, got {lane}")
        stored = self._lanes[lane]
        if lease != stored.lease:
            raise _gone(lane, lease, stored.lease)
        return stored

    def _next_of(self, lane: StoredLane) -> int:
        return lane.lane + lane.handed * self.plan.lanes

    def _chunk(self, index: int) -> Chunk:
        shape = self.plan.chunk(index)
        return Chunk(
            index=index,
            lane=shape.lane,
            lease=self._lanes[shape.lane].lease,
            first_clock=shape.first_clock,
            first_sample=shape.first_sample,
            num_samples=shape.num_samples,
            batch_size=self.plan.batch_size,
        )

    def _put(self, lane: StoredLane) -> None:
        self._state.put_lane(lane)
        self._lanes[lane.lane] = lane


def _gone(lane: int, lease: int, current: int) -> RefusedError:
    return RefusedError(
        Refusal.FAILED_PRECONDITION, f"lane {lane}: expected its current lease {current}, got {lease}: ask for a chunk"
    )

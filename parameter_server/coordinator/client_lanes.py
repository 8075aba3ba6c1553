"""Lanes for pushes by hand, from notebooks and tests, beside those of the training data."""

from __future__ import annotations

from collections.abc import Mapping

from parameter_server.coordinator.answers import ClientLane
from parameter_server.coordinator.state import CoordinatorState, StoredClientLane
from parameter_server.errors import Refusal, RefusedError
from parameter_server.shard.lane_order import CLIENT_LANES


class ClientLanes:
    """Who holds which lane; callers hold the coordinator's lock, and write within ``state.change()``.

    A lane is used again only where its holder said which clock it used last: a push with a clock that has been used
    would be taken for a duplicate. The lane of a holder that died is retired.

    Args:
        first: Number of the first one, after the lanes of the data.
        state: Where they are kept.
    """

    def __init__(self, first: int, state: CoordinatorState) -> None:
        self._first = first
        self._state = state
        self.reload()

    def reload(self) -> None:
        """Reads all lanes from the state: at the start, and after a change that was rolled back."""
        self._lanes = {lane.lane: lane for lane in self._state.client_lanes()}

    def take(self, member: int) -> ClientLane:
        """Gives a member a lane of its own: another one with each call.

        Raises:
            RefusedError: With RESOURCE_EXHAUSTED: all are held or retired.
        """
        free = next((lane for lane in self._lanes.values() if not (lane.holder or lane.retired)), None)
        if free is None and len(self._lanes) >= CLIENT_LANES:
            raise RefusedError(
                Refusal.RESOURCE_EXHAUSTED,
                f"client_lane: expected at most {CLIENT_LANES} lanes of clients, and all are held, or were by "
                "clients that ended without leaving",
            )
        lane = free or StoredClientLane(self._first + len(self._lanes), 0, 1, 0, False)
        self._put(lane._replace(lease=lane.lease + 1, holder=member))
        return ClientLane(lane.lane, lane.lease + 1, lane.next_clock)

    def release(self, member: int, clocks: Mapping[int, int]) -> None:
        """Takes back a member's lanes; those whose last clock it does not give are retired."""
        for lane in [lane for lane in self._lanes.values() if lane.holder == member]:
            if (clock := clocks.get(lane.lane)) is None:
                self._put(lane._replace(holder=0, retired=True))
            else:
                self._put(lane._replace(holder=0, next_clock=max(lane.next_clock, clock + 1)))

    def _put(self, lane: StoredClientLane) -> None:
        self._state.put_client_lane(lane)
        self._lanes[lane.lane] = lane

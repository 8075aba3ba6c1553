"""The order of pushes: of each lane, which lease may push, which number comes next, and how far its clock has come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parameter_server.errors import Refusal, RefusedError
from parameter_server.wire import Frame, Header

CLIENT_LANES = 1024  # beside those that train: for clients that push by hand; each costs a shard 32 KiB of marks
_NO_LEASE = -1


@dataclass
class LaneOrder:
    """How far a lane has come on one shard.

    Attributes:
        lease: The newest that has pushed here.
        next_seq: Of the lease's next push.
        clock: The highest seen; that of another lease or before a move included.
        frames: Applied here, of all leases together.
        form: In which routes and numbers the lease's newest push came, see ``_form_of``.
    """

    lease: int = _NO_LEASE
    next_seq: int = 1
    clock: int = 0
    frames: int = 0
    form: int = 0


class LaneOrders:
    """The orders of all lanes that have pushed to a shard."""

    def __init__(self) -> None:
        self.lanes: dict[int, LaneOrder] = {}
        self.clocks = 0
        """Sum of the lanes' highest clocks: how many batches have been pushed, as far as this shard knows."""

    def check(self, header: Header) -> bool:
        """Says whether a push has been applied before; changes nothing.

        Raises:
            RefusedError: It is of an earlier lease, or an earlier push of its lane has not arrived.
        """
        order = self.lanes.get(header.lane) or LaneOrder()
        if header.lease < order.lease:
            message = f"lane {header.lane}: expected lease {order.lease} or a later one, got {header.lease}"
            raise RefusedError(Refusal.FAILED_PRECONDITION, message)
        expected = order.next_seq if header.lease == order.lease else 1
        if header.seq > expected or header.seq < 1:
            message = f"lane {header.lane}, lease {header.lease}: expected push {expected}, got {header.seq}"
            refusal = Refusal.OUT_OF_RANGE if header.seq > expected else Refusal.INVALID_ARGUMENT
            raise RefusedError(refusal, message, expected_seq=expected)
        if header.seq == expected and header.lease == order.lease and _form_of(header) < order.form:
            # It may hold rows of a bucket that went and came back, and whose earlier pushes are queued behind it.
            message = f"lane {header.lane}: push {header.seq} comes late, and has been sent again by newer routes"
            raise RefusedError(Refusal.FAILED_PRECONDITION, message, moved=True)
        return header.seq < expected

    def advance(self, header: Header) -> None:
        """Takes down that a push that ``check`` has let pass is applied."""
        order = self.lanes.setdefault(header.lane, LaneOrder())
        order.lease, order.next_seq, order.form = header.lease, header.seq + 1, _form_of(header)
        order.frames += 1
        self.see_clock(header.lane, header.clock)

    def clocks_with(self, header: Header) -> int:
        """Says what ``clocks`` will be after a push."""
        order = self.lanes.get(header.lane)
        return self.clocks + max(0, header.clock - (order.clock if order else 0))

    def see_clock(self, lane: int, clock: int) -> None:
        """Takes down that a lane has come so far, here or on the shard that some buckets come from."""
        order = self.lanes.setdefault(lane, LaneOrder())
        self.clocks += max(0, clock - order.clock)
        order.clock = max(order.clock, clock)

    def adopt(self, lane: int, known: LaneOrder) -> int:
        """Goes on from where a lane was by another account, if that is further; returns how many frames further."""
        order = self.lanes.setdefault(lane, LaneOrder())
        if (known.lease, known.next_seq) > (order.lease, order.next_seq):
            # Its form too: one of an earlier lease or numbering would have all that comes refused as late.
            order.lease, order.next_seq, order.form = known.lease, known.next_seq, known.form
        self.see_clock(lane, known.clock)
        ahead = max(0, known.frames - order.frames)
        order.frames += ahead
        return ahead

    def copy_of(self, frames: Iterable[Frame]) -> dict[int, LaneOrder]:
        """Copies the orders of the lanes that pushed frames."""
        lanes = {frame.header.lane for frame in frames}
        return {lane: replace(self.lanes[lane]) for lane in lanes if lane in self.lanes}

    def to_array(self) -> NDArray[np.int64]:
        """Gives [n, 6] numbers: of each lane its number, and those of its order."""
        rows = [(lane, o.lease, o.next_seq, o.clock, o.frames, o.form) for lane, o in sorted(self.lanes.items())]
        return np.array(rows, np.int64).reshape(-1, 6)

    def set_array(self, rows: NDArray[np.int64]) -> None:
        """Replaces all orders by those of ``to_array``."""
        self.lanes = {lane: LaneOrder(*order) for lane, *order in rows.tolist()}
        self.clocks = sum(order.clock for order in self.lanes.values())


def _form_of(header: Header) -> int:
    """Numbers the forms in which a lease's pushes are sent: by newer routes, or numbered anew."""
    return header.route_epoch << 8 | header.codec

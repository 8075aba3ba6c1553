"""What a shard has acknowledged, in memory that outlives a killed process: by it a restart says what was lost, exactly.

The file is mapped and never synced: it tells of a process that died. After a power cut it may be as old as the last
time the operating system wrote it out, and pushes acknowledged since then are not counted as lost.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parameter_server.shard.lane_order import LaneOrder

_SLOT = 4  # lease, next seq, clock, frames
_LANE = 2 * _SLOT  # 64 bytes


class AcknowledgedPushes:
    """Per lane, the order after the last push that was acknowledged.

    Each lane has two slots, written in turn, the count of frames last: whenever the process is killed, the slot with
    the higher count is whole.
    """

    def __init__(self, path: Path, lanes: int) -> None:
        length = lanes * _LANE * 8
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, max(length, os.fstat(handle).st_size))
            self._map = mmap.mmap(handle, length)
        finally:
            os.close(handle)
        self._lock = threading.Lock()
        self._slots: NDArray[np.int64] = np.frombuffer(self._map, np.int64).reshape(lanes, 2, _SLOT)

    def note(self, orders: Mapping[int, LaneOrder]) -> None:
        """Takes down orders of lanes, where they are further than what is taken down; from any thread."""
        with self._lock:
            for lane, order in orders.items():
                slots = self._slots[lane]
                if order.frames > slots[:, 3].max():
                    slot = slots[order.frames & 1]
                    slot[:3] = order.lease, order.next_seq, order.clock
                    slot[3] = order.frames

    def read(self) -> dict[int, LaneOrder]:
        """Gives the orders of all lanes of which something was acknowledged."""
        newest = self._slots[:, :, 3].argmax(axis=1)
        orders = {}
        for lane in np.flatnonzero(self._slots[:, :, 3].any(axis=1)).tolist():
            lease, next_seq, clock, frames = self._slots[lane, newest[lane]].tolist()
            orders[lane] = LaneOrder(lease, next_seq, clock, frames)
        return orders

    def close(self) -> None:
        """Unmaps the file; nothing is taken down any more."""
        with self._lock:
            self._slots = np.zeros_like(self._slots)
            self._map.close()

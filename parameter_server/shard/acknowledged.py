"""What a shard has acknowledged, in memory that outlives a killed process: by it a restart says what was lost, exactly.

The file is mapped and never synced: it tells of a process that died. After a power cut it may be as old as the last
time the operating system wrote it out, and pushes acknowledged since then are not counted as lost.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import xxhash

from parameter_server.shard.lane_order import LaneOrder

_ORDER = struct.Struct("<5q")  # the fields of LaneOrder
_DIGEST = struct.Struct("<Q")
_SLOT = 64  # bytes, a line of the processor's cache; the digest follows the order
_LANE = 2 * _SLOT


class AcknowledgedPushes:
    """Per lane, the order after the last push that was acknowledged.

    Each lane has two slots, written in turn: wherever the process is killed, one of them is whole, and a digest tells
    it from one that is half written.
    """

    def __init__(self, path: Path, lanes: int) -> None:
        length = lanes * _LANE
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, max(length, os.fstat(handle).st_size))
            self._map = mmap.mmap(handle, length)
        finally:
            os.close(handle)
        self._lock = threading.Lock()
        self._lanes = lanes
        self._newest = {lane: (order.frames, place) for lane, (order, place) in self._find().items()}

    def note(self, orders: Mapping[int, LaneOrder]) -> None:
        """Takes down orders of lanes, where they are further than what is taken down; from any thread."""
        with self._lock:
            if self._map.closed:
                return
            for lane, order in orders.items():
                frames, place = self._newest.get(lane, (0, lane * _LANE + _SLOT))
                if order.frames > frames:
                    place ^= _SLOT  # never the only one that is whole, whatever the numbers are
                    body = _ORDER.pack(order.lease, order.next_seq, order.clock, order.frames, order.form)
                    self._map[place : place + _ORDER.size + _DIGEST.size] = body + _digest_of(body)
                    self._newest[lane] = (order.frames, place)

    def read(self) -> dict[int, LaneOrder]:
        """Gives the orders of all lanes of which something was acknowledged."""
        return {lane: order for lane, (order, _) in self._find().items()}

    def close(self) -> None:
        """Unmaps the file; nothing is taken down any more."""
        with self._lock:
            self._map.close()

    def _find(self) -> dict[int, tuple[LaneOrder, int]]:
        """Finds, of each lane, the newest order that is whole, and the place of its slot."""
        newest: dict[int, tuple[LaneOrder, int]] = {}
        for place in range(0, self._lanes * _LANE, _SLOT):
            body = self._map[place : place + _ORDER.size]
            if self._map[place + _ORDER.size : place + _ORDER.size + _DIGEST.size] == _digest_of(body):
                order, lane = LaneOrder(*_ORDER.unpack(body)), place // _LANE
                if lane not in newest or order.frames > newest[lane][0].frames:
                    newest[lane] = order, place
        return newest


def _digest_of(body: bytes) -> bytes:
    return _DIGEST.pack(xxhash.xxh3_64_intdigest(body))

"""What was acknowledged is known after a kill at any moment, and senders can go on from it, whatever their lease."""

from __future__ import annotations

import struct
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest

from parameter_server.errors import RefusedError
from parameter_server.shard.acknowledged import AcknowledgedPushes
from parameter_server.shard.lane_order import LaneOrder
from parameter_server.wire import Flag

WORD = 8


def tears(before: bytes, after: bytes) -> list[bytes]:
    """Gives every state of a file in which some of the words that a write changes are written, and others are not."""
    changed = [at for at in range(0, len(after), WORD) if before[at : at + WORD] != after[at : at + WORD]]
    assert changed
    torn = []
    for written in chain.from_iterable(combinations(changed, count) for count in range(len(changed))):
        content = bytearray(before)
        for at in written:
            content[at : at + WORD] = after[at : at + WORD]
        torn.append(bytes(content))
    return torn


def note(path: Path, order: LaneOrder, lane: int = 2) -> bytes:
    acknowledged = AcknowledgedPushes(path, 4)
    acknowledged.note({lane: order})
    acknowledged.close()
    return path.read_bytes()


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_write_that_was_cut_leaves_the_order_before_it(tmp_path, frames):
    path = tmp_path / "acknowledged"
    note(path, LaneOrder(5, 9, 9, 1, 1 << 8), lane=1)
    known = None
    for push in range(1, 7):
        before = path.read_bytes()
        # Numbers that differ from one push to the next in each field.
        order = LaneOrder(lease=push, next_seq=10 + push, clock=20 + push, frames=frames * push, form=256 * push)
        after = note(path, order)
        for torn in tears(before, after):
            path.write_bytes(torn)
            acknowledged = AcknowledgedPushes(path, 4)
            found = acknowledged.read()
            assert found.pop(1) == LaneOrder(5, 9, 9, 1, 1 << 8)
            assert found == ({} if known is None else {2: known})
            # What is taken down next is whole again.
            acknowledged.note({2: order})
            assert acknowledged.read()[2] == order
            acknowledged.close()
        path.write_bytes(after)
        known = order


def test_fewer_frames_than_are_known_change_nothing(tmp_path):
    path = tmp_path / "acknowledged"
    before = note(path, LaneOrder(1, 5, 4, 4))
    assert note(path, LaneOrder(1, 4, 3, 3)) == before
    acknowledged = AcknowledgedPushes(path, 4)
    acknowledged.close()
    acknowledged.note({2: LaneOrder(1, 6, 5, 5)})  # a thread that comes late
    assert path.read_bytes() == before


def test_pushes_of_two_tables_are_counted_though_the_next_note_was_cut(run):
    shard = run.start(durability="snapshot")

    def push(clock: int) -> None:
        run.send(shard, [run.frame(0, clock, seq=2 * clock - 1 + table, table=table) for table in (0, 1)])

    push(1)
    shard.snapshot()
    for clock in range(2, 6):
        push(clock)
    path = run.folder / "shard-0" / "acknowledged"
    before = path.read_bytes()
    push(6)  # of which nobody was told
    after = path.read_bytes()
    shard.close()
    for number, torn in enumerate(tears(before, after)):
        path.write_bytes(torn)
        again = run.start()
        assert again.counts.lost_pushes == 8, number
        assert again._guarded.state.orders.lanes[0].next_seq == 11
        again.close()
    again = run.start()
    (first, second) = run.send(again, [run.frame(0, 6, seq=11 + table, table=table) for table in (0, 1)])
    assert not (first.header.flags | second.header.flags) & Flag.DUPLICATE
    np.testing.assert_array_equal(run.pull(again), run.sums([(0, 1), (0, 6)]))


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_lease_goes_on_after_crashes_though_the_one_before_had_other_routes_or_numbers(run, crashes):
    shard = run.start(durability="snapshot")
    run.push(shard, 0, 1, lease=7, seq=1, route_epoch=2, codec=5)
    shard.snapshot()
    run.push(shard, 0, 2, lease=8, seq=1, route_epoch=1, codec=0)
    for _ in range(crashes):
        shard.close()
        shard = run.start()
        assert shard.counts.lost_pushes == 1
    assert run.push(shard, 0, 3, lease=8, seq=2, route_epoch=1, codec=0)
    assert run.push(shard, 0, 4, lease=8, seq=3, route_epoch=1, codec=1)
    shard.close()
    shard = run.start()
    assert shard.counts.lost_pushes == 3
    # What was sent in an older form still comes too late: it may have been sent again by newer routes.
    with pytest.raises(RefusedError, match="comes late") as caught:
        run.push(shard, 0, 5, lease=8, seq=4, route_epoch=1, codec=0)
    assert caught.value.moved
    assert run.push(shard, 0, 5, lease=8, seq=4, route_epoch=1, codec=1)
    np.testing.assert_array_equal(run.pull(shard), run.sums([(0, 1), (0, 5)]))


def test_a_file_of_zeros_or_noise_says_nothing(tmp_path):
    path = tmp_path / "acknowledged"
    path.write_bytes(bytes(512) + struct.pack("<64q", *range(64)))
    acknowledged = AcknowledgedPushes(path, 8)
    assert acknowledged.read() == {}
    acknowledged.close()

"""Pushes are applied exactly once, whatever a connection does to them, and wherever their rows have gone meanwhile."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from parameter_server.client.rows_client import LaneLease, Push
from parameter_server.errors import ConnectionLost, LaneLostError, ShardUnreachableError

ROWS, DIM = 400, 4  # of the world's tables


@pytest.mark.parametrize("seed", range(4))
def test_pushes_are_applied_once_while_connections_fail_and_buckets_move(make_world, seed) -> None:
    world = make_world(seed, 0.4, max_in_flight=4)
    lanes = [LaneLease(3, 1), LaneLease(9, 5)]
    for clock in range(1, 41):
        for lane in lanes:
            world.push(lane, clock)
        if clock % 5 == 0:
            source, target = world.random.choice(3, 2, replace=False)
            world.move(int(source), int(target), float(world.random.choice([0.2, 1.0])))
    world.client.wait()
    assert world.client.unacknowledged == 0
    np.testing.assert_array_equal(world.table(), world.truth)
    assert max(shard.most_frames for shard in world.shards) >= 3  # a clock's tables share messages


def test_without_faults_each_push_is_one_message_per_shard(make_world) -> None:
    world = make_world(0, 0.0, max_in_flight=1)
    for clock in range(1, 6):
        world.push(LaneLease(0, 1), clock).result(timeout=10)
    assert [shard.most_frames for shard in world.shards] == [3, 3, 3]
    np.testing.assert_array_equal(world.table(), world.truth)


def test_a_new_lease_computes_again_what_its_predecessor_left_and_nothing_counts_twice(make_world) -> None:
    world = make_world(1, 0.3)
    first, second = LaneLease(4, 1), LaneLease(4, 2)
    pushes = []
    for clock in (1, 2, 3):
        ids = world.random.choice(ROWS, 50, replace=False)
        pushes.append(Push(1, ids, np.ones((50, DIM), np.float32)))
        world.client.push(first, clock, [pushes[-1]])
    world.client.wait()
    before = world.table()
    for clock, push in enumerate(pushes, 1):
        world.client.push(second, clock, [push])
    world.client.push(second, 4, [pushes[0]])
    world.client.wait()
    expected = before.copy()
    expected[1, pushes[0].ids] -= 1
    np.testing.assert_array_equal(world.table(), expected)
    with pytest.raises(ValueError, match="expected lease 2 of lane 4 or a later one, got 1"):
        world.client.push(first, 5, pushes[:1])


def test_a_lane_leased_to_somebody_else_is_given_up(make_world) -> None:
    world = make_world(2, 0.0)
    for shard in world.shards:
        shard.orders[0] = (9, 1, (0, 0))
    failed = world.push(LaneLease(0, 8), 1)
    with pytest.raises(LaneLostError, match=r"shard \d at local:\d, lane 0, push 1: lease 9"):
        failed.result(timeout=10)
    assert isinstance(world.push(LaneLease(0, 8), 2).exception(timeout=10), LaneLostError)
    with pytest.raises(LaneLostError):
        world.client.wait()
    world.client.wait()  # said once
    assert not world.table().any()


def test_a_shard_that_does_not_come_back_is_named(make_world) -> None:
    world = make_world(4, 0.0, deadline_seconds=0.1)
    world.push(LaneLease(0, 1), 1)
    world.client.wait()
    for connection in world.opened:
        connection.is_dead = True
    failed = world.push(LaneLease(0, 1), 2)
    expected = (
        r"shard \d at local:\d, lane 0, push \d: expected success within 0.1 s, got \d+ failures in .* s, .* dead"
    )
    with pytest.raises(ShardUnreachableError, match=expected):
        failed.result(timeout=10)


def test_a_push_waits_while_too_many_are_unacknowledged(make_world) -> None:
    world = make_world(5, 0.0, max_in_flight=2)
    with world.house:  # nothing is answered
        world.push(LaneLease(0, 1), 1)
        world.push(LaneLease(0, 1), 2)
        late = ThreadPoolExecutor(1)
        third = late.submit(world.push, LaneLease(0, 1), 3)
        time.sleep(0.05)
        assert not third.done()
        assert world.client.unacknowledged == 2
    third.result(timeout=10).result(timeout=10)
    late.shutdown()
    np.testing.assert_array_equal(world.table(), world.truth)


def test_closing_fails_what_is_under_way_and_leaves_no_threads(make_world) -> None:
    before = set(threading.enumerate())
    world = make_world(6, 0.0)
    with world.house:
        pushed = world.push(LaneLease(0, 1), 1)
        closing = threading.Thread(target=world.client.close)
        closing.start()
        assert isinstance(pushed.exception(timeout=10), ConnectionLost)
    closing.join(timeout=10)
    with pytest.raises(ConnectionLost, match="closed"):
        world.push(LaneLease(0, 1), 2)
    world.close()
    assert set(threading.enumerate()) == before

"""What a shard has lost, or what comes late, changes nothing but what was lost: numbers and forms tell pushes apart."""

from __future__ import annotations

import numpy as np
import pytest

from parameter_server.client.rows_client import LaneLease
from parameter_server.errors import LaneLostError, RefusedError
from parameter_server.partition import Routes
from parameter_server.shard.shard import Shard
from parameter_server.wire import Header, Op, encode, join

DIM = 4  # of the world's tables


def test_a_shard_that_came_back_without_some_pushes_loses_those_alone(make_world) -> None:
    world = make_world(3, 0.0, "snapshot")
    lane = LaneLease(0, 1)
    for clock in range(1, 4):
        world.push(lane, clock)
    world.client.wait()
    saved = [shard.save() for shard in world.shards]
    for clock in range(4, 9):  # acknowledged, and lost by the first shard
        world.push(lane, clock)
    world.client.wait()
    kept = world.table()
    world.shards[0].forget(saved[0])
    lost = world.table() - kept
    assert lost.any()
    for clock in range(9, 12):
        world.push(lane, clock)
    world.client.wait()
    np.testing.assert_array_equal(world.table(), world.truth + lost)


def test_a_lease_ends_when_its_numberings_can_no_longer_be_told_apart(make_world) -> None:
    world = make_world(3, 0.0, "snapshot")
    lane = LaneLease(0, 1)
    world.push(lane, 1).result(timeout=10)
    saved, forms = world.shards[0].save(), []
    world.push(lane, 2).result(timeout=10)
    for clock in range(3, 258):
        world.shards[0].forget(saved)  # the push before this is lost, and so the next is numbered anew
        world.push(lane, clock).result(timeout=10)
        forms.append(world.shards[0].orders[0][2])
    assert forms == [(1, numbering) for numbering in range(1, 256)]
    world.shards[0].forget(saved)
    with pytest.raises(LaneLostError, match=r"shard 0 at .*, lane 0, push .*: expected at most 255 times"):
        world.push(lane, 258).result(timeout=10)
    assert world.push(LaneLease(0, 2), 258).exception(timeout=10) is None


def test_a_shard_that_promised_to_lose_nothing_and_did_is_not_passed_over(make_world) -> None:
    world = make_world(3, 0.0, "journal")
    for clock in range(1, 4):
        world.push(LaneLease(0, 1), clock)
    world.client.wait()
    world.shards[1].forget(({}, {}, {}))
    failed = world.push(LaneLease(0, 1), 4)
    assert "expected a shard that keeps what it has acknowledged" in str(failed.exception(timeout=10))


@pytest.mark.parametrize("shard_kind", ["model", "real"])
def test_what_comes_late_cannot_overtake_rows_whose_bucket_went_and_came_back(
    shard_kind, make_model_shard, describe
) -> None:
    """Clocks 1 and 2 are lost; their bucket goes and comes back, so that they are queued again, behind what stayed."""
    addresses = {0: "local:0", 1: "local:1"}
    routes = Routes(epoch=3, owners=np.zeros(4096, np.int32), addresses=addresses)
    shard = make_model_shard(routes, 0) if shard_kind == "model" else Shard(describe("none"), 0)
    if isinstance(shard, Shard):
        shard.set_routes(routes)
    went = np.array([5])

    def push(seq: int, clock: int, epoch: int, ids: np.ndarray) -> None:
        head = Header(op=Op.PUSH, run_id=7, table=0, lane=1, lease=1, seq=seq, clock=clock, route_epoch=epoch, dim=DIM)
        shard.push(join([encode(head, ids, np.ones((len(ids), DIM), np.float32))]))

    push(seq=1, clock=1, epoch=3, ids=went[:0])  # what stayed of the first, sent again
    with pytest.raises(RefusedError) as late:
        push(seq=2, clock=2, epoch=1, ids=went)  # the second, as it was sent before
    assert late.value.moved
    push(seq=2, clock=2, epoch=3, ids=went[:0])
    push(seq=3, clock=1, epoch=3, ids=went)
    push(seq=4, clock=2, epoch=3, ids=went)
    if isinstance(shard, Shard):
        assert shard.counts.pushed_rows == 2
        shard.close()
    else:
        assert shard.rows[0, 5].tolist() == [-2.0] * DIM

"""Buckets move while pushes go on, and whoever dies at whichever step, the table equals the acknowledged pushes."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import pytest

from parameter_server.errors import ConnectionLost, RefusedError

STEPS = ("copy", "freeze", "keep", "commit", "tell", "drop")


class DiedError(Exception):
    """A coordinator that ends in the middle of a move."""


def test_shards_join_and_are_drained_under_pushes(world: Any) -> None:
    world.start_shard("a")
    world.balance()
    with world.pushing() as pusher:
        while pusher.pushes < 2:
            time.sleep(0.02)
        world.start_shard("b")
        world.start_shard("c")
        world.balance()
        assert world.counts().max() - world.counts().min() <= 1
        world.coordinator.drain(0)
        world.balance()
        pushes = pusher.pushes
        while pusher.pushes < pushes + 5:
            time.sleep(0.02)
    assert world.counts().tolist() == [0, 2048, 2048]
    world.check()
    status = world.coordinator.status()
    assert status.moves_done >= 2 * 2048 // 700
    assert 0 < status.longest_freeze_seconds < 1
    assert pusher.pushes > 10
    assert pusher.longest < 1.5


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", ["coordinator", "sender", "receiver"])
def test_whoever_dies_at_whichever_step(world: Any, step: str, who: str) -> None:
    world.start_shard("a")
    world.balance()
    world.fill()
    if world.run.durability == "snapshot":
        world.keeper.snapshot()
    world.start_shard("b")
    died, copies = threading.Event(), itertools.count()

    def fail(at: str) -> None:
        # Between passes of the copy, pushes go on; those after a snapshot would be lost with the shard, as they may.
        if (at == "freeze" or (at == "copy" and next(copies) == 1)) and world.run.durability == "journal":
            world.fill()
        if at != step or died.is_set():
            return
        died.set()
        if who == "coordinator":
            raise DiedError
        name = "a" if who == "sender" else "b"
        world.kill(name)
        world.start_shard(name)

    world.fail_at = fail
    for _ in range(100):
        try:
            if not world.keeper.step():
                break
        except DiedError:
            world.restart_coordinator()
        except (ConnectionLost, RefusedError):
            pass
    assert died.is_set()
    assert world.counts().tolist() == [2048, 2048]
    world.fill()
    world.check()


@pytest.mark.parametrize("world", ["snapshot"], indirect=True)
def test_snapshots_need_all_shards(world: Any) -> None:
    world.start_shard("a")
    world.start_shard("b")
    world.balance()
    assert world.keeper.snapshot("one").name == "one"
    world.kill("b")
    with pytest.raises(ConnectionLost):
        world.keeper.snapshot("two")
    assert world.coordinator.status().snapshots == ("one",)

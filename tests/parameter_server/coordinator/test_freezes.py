"""A freeze ends by itself, or is kept: no push between its end and a move is lost, and no late order does harm."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from parameter_server.errors import Refusal, RefusedError


def test_pushes_between_a_lost_freeze_and_the_commit_are_kept(world: Any) -> None:
    world.start_shard("a")
    world.balance()
    world.fill()
    world.start_shard("b")
    sender = world.controls[world.names["a"]]
    thawed = threading.Event()

    def fail(at: str) -> None:
        if at == "keep" and not thawed.is_set():
            thawed.set()
            for order in list(sender._freezes):  # as its timer does, where a coordinator sleeps for too long
                sender._expire(order)
            world.fill()

    world.fail_at = fail
    with pytest.raises(RefusedError, match="expected it to hold, but it is over"):
        world.balance()
    world.balance()
    assert thawed.is_set()
    assert world.counts().tolist() == [2048, 2048]
    world.check()


def test_late_orders_are_refused(world: Any) -> None:
    world.start_shard("a")
    world.start_shard("b")
    world.balance()
    world.fill()
    control = world.controls[world.names["b"]]
    routes = world.coordinator.routes()
    assert routes is not None
    late = 1 << 40
    mine, theirs = routes.owned_by(1), routes.owned_by(0)
    for call in (
        lambda: control.settle(late, routes),
        lambda: control.freeze(late, mine, 1),
        lambda: control.copy(late, world.names["a"], theirs, [], is_last=True),
        lambda: control.keep_frozen(late),
        lambda: control.copy(1 << 50, world.names["a"], mine, [], is_last=True),
    ):
        with pytest.raises(RefusedError) as error:
            call()
        assert error.value.refusal is Refusal.FAILED_PRECONDITION
    control.thaw(late)
    world.check()


def test_a_freeze_ends_by_itself(world: Any) -> None:
    world.start_shard("a")
    world.balance()
    control = world.controls[world.names["a"]]
    control.freeze(1 << 50, np.ones(4096, np.bool_), 0.05)
    world.fill()  # waits
    world.check()
    control.freeze((1 << 50) + 1, np.ones(4096, np.bool_), 5.0)
    timer = control._freezes[(1 << 50) + 1].timer
    control.keep_frozen((1 << 50) + 1)
    timer.function(*timer.args)  # too late
    assert control._freezes
    control.thaw((1 << 50) + 1)
    world.fill()

"""Buckets move while pushes go on, and whoever dies at whichever step, the table equals the acknowledged pushes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.client.frame_cutting import Push
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.moves import ShardKeeper
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.shard.control import ShardControl, ShardLink
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

IDS, DIM = 3000, 4
TABLE = TableConfig(
    name="t", num_rows=IDS, dim=DIM, features=("f",), init_scale=0.0, optimizer=RowSGD(learning_rate=1.0)
)
STEPS = ("copy", "freeze", "keep", "commit", "tell", "drop")


class DiedError(Exception):
    """A coordinator that ends in the middle of a move."""


class Link:
    """A shard as long as it lives: calls of one that was killed end as a lost connection does."""

    def __init__(self, world: World, address: str) -> None:
        self._world, self._control = world, world.controls.get(address)

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            if self._control is None or self._control not in self._world.controls.values():
                raise ConnectionLost("shard: killed")
            return getattr(self._control, name)(*args, **more)

        return call

    def close(self) -> None:
        pass


class Pushes(LocalConnection):
    """Rows of a shard as long as it lives."""

    def __init__(self, world: World, address: str) -> None:
        super().__init__(Verbs(world, address))


class Verbs:
    def __init__(self, world: World, address: str) -> None:
        self._world, self._address = world, address

    def __getattr__(self, name: str) -> Callable[[bytes], object]:
        def call(message: bytes) -> object:
            if (shard := self._world.engines.get(self._address)) is None:
                raise ConnectionLost("shard: killed")
            return getattr(shard, name)(message)

        return call


class World:
    """A coordinator with a state on disk, shards with folders, and a pusher."""

    def __init__(self, folder: Path, durability: str) -> None:
        self.folder = folder
        self.run = RunDescription(run_id=1, seed=0, tables=(TABLE,), lanes=1, durability=durability)  # type: ignore[arg-type]
        self.engines: dict[str, Shard] = {}
        self.controls: dict[str, ShardControl] = {}
        self.names: dict[str, str] = {}
        self.ports = itertools.count()
        self.pushed = np.zeros(IDS)
        self.fail_at: Callable[[str], None] = lambda _: None
        self.open_coordinator()

    def open_coordinator(self) -> None:
        self.coordinator = Coordinator(self.run, path=self.folder / "state", lease_seconds=3600)
        self.keeper = ShardKeeper(self.coordinator, self.link, portion=700, on_step=lambda step: self.fail_at(step))

    def link(self, address: str) -> ShardLink:
        return Link(self, address)  # type: ignore[return-value]

    def start_shard(self, name: str) -> None:
        address = f"local:{next(self.ports)}"
        self.names[name] = address
        registered = self.coordinator.register("shard", name, address)
        kept = None if self.run.durability == "none" else self.folder / name
        assert registered.shard is not None
        shard = Shard(self.run, registered.shard, folder=kept, journal_sync="none")
        if registered.routes is not None:
            shard.set_routes(registered.routes)
        self.engines[address], self.controls[address] = shard, ShardControl(shard, self.link)

    def kill(self, name: str) -> None:
        """Ends a shard as a kill does, for all that others see: its calls are refused, its memory is gone."""
        address = self.names[name]
        self.controls.pop(address).stop()
        self.engines.pop(address).close()

    def restart_coordinator(self) -> None:
        self.coordinator.close()
        self.open_coordinator()

    def balance(self) -> None:
        while self.keeper.step():
            pass

    def counts(self) -> np.ndarray:
        routes = self.coordinator.routes()
        assert routes is not None
        return np.bincount(routes.owners)

    def check(self) -> None:
        routes = self.coordinator.routes()
        assert routes is not None
        with closing(RowsClient(self.run, Fixed(routes), lambda address: Pushes(self, address))) as client:
            ((pulled, *_),) = [client.pull([(0, np.arange(IDS))]).result(20)]
        rows = pulled[0] if isinstance(pulled, tuple) else pulled.rows
        np.testing.assert_array_equal(rows, np.repeat(-self.pushed[:, None], DIM, 1))
        held = sum(sum(shard.num_rows) for shard in self.engines.values())
        assert held == np.count_nonzero(self.pushed)  # nothing is left where it no longer belongs

    def close(self) -> None:
        for name, address in self.names.items():
            if address in self.engines:
                self.kill(name)
        self.coordinator.close()


class Fixed:
    """Routes that do not change."""

    def __init__(self, routes: object) -> None:
        self._routes = routes

    def current(self) -> object:
        return self._routes

    def newer_than(self, epoch: int) -> object:
        time.sleep(0.05)
        return self._routes


class Pusher:
    """Pushes ones to random rows until told to stop, and counts what is acknowledged."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ends = threading.Event()
        self.pushes = 0
        self.longest = 0.0
        self._thread = threading.Thread(target=self._push)

    def __enter__(self) -> Pusher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _push(self) -> None:
        world, rng = self._world, np.random.default_rng(0)
        source = CoordinatorRoutes(LocalCoordinatorClient(world.coordinator))
        with closing(RowsClient(world.run, source, lambda address: Pushes(world, address))) as client:
            for clock in itertools.count(1):
                if self._ends.is_set():
                    return
                ids = np.unique(rng.integers(0, IDS, 200))
                began = time.monotonic()
                client.push(LaneLease(0, 1), clock, [push(ids)]).result(60)
                if clock > 1:  # the first one compiles kernels
                    self.longest = max(self.longest, time.monotonic() - began)
                world.pushed[ids] += 1
                self.pushes += 1


def push(ids: np.ndarray) -> Push:
    return Push(table=0, ids=ids, gradients=np.ones((ids.size, DIM), np.float32))


@pytest.fixture(params=["journal", pytest.param("snapshot", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with closing(World(tmp_path, request.param)) as world:
        yield world


def test_shards_join_and_are_drained_under_pushes(world: World) -> None:
    world.start_shard("a")
    world.balance()
    with Pusher(world) as pusher:
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


def fill(world: World) -> None:
    """Pushes by hand, with marks that must travel, and from two lanes."""
    routes = world.coordinator.routes()
    assert routes is not None
    with closing(RowsClient(world.run, Fixed(routes), lambda address: Pushes(world, address))) as client:
        for lane in (0, 1):
            ids = np.arange(lane, IDS, 2)
            clock = int(world.pushed[ids[0]]) + 1
            client.push(LaneLease(lane, 1 + clock), clock, [push(ids)]).result(20)
            world.pushed[ids] += 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", ["coordinator", "sender", "receiver"])
def test_whoever_dies_at_whichever_step(world: World, step: str, who: str) -> None:
    world.start_shard("a")
    world.balance()
    fill(world)
    if world.run.durability == "snapshot":
        world.keeper.snapshot()
    world.start_shard("b")
    died, copies = threading.Event(), itertools.count()

    def fail(at: str) -> None:
        # Between passes of the copy, pushes go on; those after a snapshot would be lost with the shard, as they may.
        if (at == "freeze" or (at == "copy" and next(copies) == 1)) and world.run.durability == "journal":
            fill(world)
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
    fill(world)
    world.check()


def test_pushes_between_a_lost_freeze_and_the_commit_are_kept(world: World) -> None:
    world.start_shard("a")
    world.balance()
    fill(world)
    world.start_shard("b")
    sender = world.controls[world.names["a"]]
    thawed = threading.Event()

    def fail(at: str) -> None:
        if at == "keep" and not thawed.is_set():
            thawed.set()
            for order in list(sender._freezes):  # as its timer does, where a coordinator sleeps for too long
                sender._expire(order)
            fill(world)

    world.fail_at = fail
    with pytest.raises(RefusedError, match="expected it to hold, but it is over"):
        world.balance()
    world.balance()
    assert thawed.is_set()
    assert world.counts().tolist() == [2048, 2048]
    world.check()


def test_late_orders_are_refused(world: World) -> None:
    world.start_shard("a")
    world.start_shard("b")
    world.balance()
    fill(world)
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


def test_a_freeze_ends_by_itself(world: World) -> None:
    world.start_shard("a")
    world.balance()
    control = world.controls[world.names["a"]]
    control.freeze(1 << 50, np.ones(4096, np.bool_), 0.05)
    fill(world)  # waits
    world.check()
    control.freeze((1 << 50) + 1, np.ones(4096, np.bool_), 5.0)
    timer = control._freezes[(1 << 50) + 1].timer
    control.keep_frozen((1 << 50) + 1)
    timer.function(*timer.args)  # too late
    assert control._freezes
    control.thaw((1 << 50) + 1)
    fill(world)


def test_snapshots_need_all_shards(tmp_path: Path) -> None:
    with closing(World(tmp_path, "snapshot")) as world:
        world.start_shard("a")
        world.start_shard("b")
        world.balance()
        assert world.keeper.snapshot("one").name == "one"
        world.kill("b")
        with pytest.raises(ConnectionLost):
            world.keeper.snapshot("two")
        assert world.coordinator.status().snapshots == ("one",)

"""What tests of the coordinator share: one whose clock stands still until they set it; one with shards, and pushes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.client.frame_cutting import Push
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes, FixedRoutes
from parameter_server.coordinator.answers import Chunk
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


class Time:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class AskedCoordinator(Coordinator):
    """A coordinator that is asked in few words."""

    def join(self) -> int:
        """Registers a trainer."""
        text = self.description.to_json() if self.description else None
        return self.register("trainer", "t", description_json=text).member

    def take(self, member: int) -> Chunk:
        """Gives a trainer a chunk, as there is one."""
        chunk = self.next_chunk(member)
        assert isinstance(chunk, Chunk)
        return chunk

    def complete(self, member: int, chunk: Chunk) -> None:
        """Takes a chunk back."""
        self.complete_chunk(member, chunk.lane, chunk.lease, chunk.index)


@pytest.fixture
def described() -> RunDescription:
    """A run of 17 chunks in 4 lanes, the last of the first two epochs smaller than the others."""
    return RunDescription(
        run_id=7,
        seed=0,
        tables=(TableConfig(name="t", num_rows=10, dim=4, features=("f",)),),
        lanes=4,
        staleness=1,
        samples=200,
        epoch_samples=90,
        batch_size=4,
        chunk_batches=3,
    )


@pytest.fixture
def coordinate() -> type[AskedCoordinator]:
    """Makes a coordinator."""
    return AskedCoordinator


@pytest.fixture
def time() -> Time:
    """What `run` takes for the time."""
    return Time()


@pytest.fixture
def run(described: RunDescription, time: Time) -> Iterator[AskedCoordinator]:
    """A coordinator of the run."""
    with closing(AskedCoordinator(described, lease_seconds=10, clock=time)) as coordinator:
        yield coordinator


@pytest.fixture
def refused() -> Callable[[Refusal, str, Callable[[], object]], None]:
    """Makes a call, and checks how it is refused."""

    def call_and_check(refusal: Refusal, message: str, call: Callable[[], object]) -> None:
        with pytest.raises(RefusedError, match=message) as error:
            call()
        assert error.value.refusal is refusal

    return call_and_check


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

    def fill(self) -> None:
        """Pushes by hand, with marks that must travel, and from two lanes."""
        routes = self.coordinator.routes()
        assert routes is not None
        with closing(RowsClient(self.run, FixedRoutes(routes), lambda address: Pushes(self, address))) as client:
            for lane in (0, 1):
                ids = np.arange(lane, IDS, 2)
                clock = int(self.pushed[ids[0]]) + 1
                client.push(LaneLease(lane, 1 + clock), clock, [push(ids)]).result(20)
                self.pushed[ids] += 1

    def pushing(self) -> Pusher:
        """Pushes beside what is done within."""
        return Pusher(self)

    def check(self) -> None:
        """Rows are the sums of what was acknowledged, each of them on the shard where it belongs."""
        routes = self.coordinator.routes()
        assert routes is not None
        with closing(RowsClient(self.run, FixedRoutes(routes), lambda address: Pushes(self, address))) as client:
            (pulled,) = client.pull([(0, np.arange(IDS))]).result(20)
        np.testing.assert_array_equal(pulled.rows, np.repeat(-self.pushed[:, None], DIM, 1))
        held = sum(sum(shard.num_rows) for shard in self.engines.values())
        assert held == np.count_nonzero(self.pushed)  # nothing is left where it no longer belongs

    def close(self) -> None:
        for name, address in self.names.items():
            if address in self.engines:
                self.kill(name)
        self.coordinator.close()


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
                began = monotonic()
                client.push(LaneLease(0, 1), clock, [push(ids)]).result(60)
                if clock > 1:  # the first one compiles kernels
                    self.longest = max(self.longest, monotonic() - began)
                world.pushed[ids] += 1
                self.pushes += 1


def push(ids: np.ndarray) -> Push:
    return Push(table=0, ids=ids, gradients=np.ones((ids.size, DIM), np.float32))


@pytest.fixture(params=["journal", pytest.param("snapshot", marks=pytest.mark.long)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A coordinator and no shards yet, of a run of either durability."""
    with closing(World(tmp_path, request.param)) as world:
        yield world

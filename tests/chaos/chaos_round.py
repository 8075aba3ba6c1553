"""What happens to a run in a round of chaos, drawn from a seed, and what must be true of its rows afterwards."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from cluster import LEASE_SECONDS, Cluster
from sum_job import expected_rows, hand_gradients, hand_ids, hand_rows

from parameter_server.client.rows_client import LaneLease, Push, RowsClient
from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.description import RunDescription
from parameter_server.partition import buckets_of, salt_of
from parameter_server.transports import GrpcConnection


class HandPusher:
    """A client that pushes by hand, and knows what was acknowledged.

    Args:
        client: Of the coordinator.
        description: Of the run.
    """

    def __init__(self, client: GrpcCoordinatorClient, description: RunDescription, name: str = "hand") -> None:
        self._member = client.register("client", name).member
        given = client.client_lane(self._member)
        self.client, self.description, self.lane = client, description, LaneLease(given.lane, given.lease)
        self.rows = RowsClient(description, CoordinatorRoutes(client), connect, deadline_seconds=60)
        self.pushed: list[Future[None]] = []  # by clock, from 1
        self._first_clock = given.next_clock

    def push(self, times: int = 1) -> None:
        """Pushes, and does not wait for the answers."""
        for _ in range(times):
            clock = self._first_clock + len(self.pushed)
            given = [Push(table, ids, gradients) for table, ids, gradients in hand_gradients(self.lane.lane, clock)]
            self.pushed.append(self.rows.push(self.lane, clock, given))

    @property
    def acknowledged(self) -> int:
        """How many pushes, from the first on, are acknowledged."""
        return next((n for n, push in enumerate(self.pushed) if not push.done() or push.exception()), len(self.pushed))

    def clocks(self, pushes: int) -> range:
        """Gives the clocks of the first pushes."""
        return range(self._first_clock, self._first_clock + pushes)

    def keep_alive(self) -> None:
        """Tells the coordinator that this client lives."""
        with contextlib.suppress(ConnectionError):
            self.client.heartbeat(self._member)

    def close(self) -> None:
        """Gives up what is not acknowledged."""
        self.rows.close()


def connect(address: str) -> GrpcConnection:
    """Connects so that lost calls are soon known to be lost."""
    return GrpcConnection(address, call_seconds=3.0)


class Chaos:
    """Draws and does what happens to a cluster.

    Args:
        cluster: Running.
        seed: Of everything drawn.
    """

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster, self.draw = cluster, random.Random(seed)
        self.happened: list[str] = []
        self._beside = ThreadPoolExecutor(4, "chaos")
        self._under_way: list[Future[None]] = []
        self._trainers = self._shards = 100  # numbers of new ones
        self._events: list[tuple[int, Callable[[], None]]] = [
            (4, self.kill_shard),
            (3, self.kill_trainer),
            (2, self.kill_coordinator),
            (2, lambda: self.pause("shard", 0.6)),
            (3, lambda: self.pause("trainer", 2.0)),
            (1, lambda: self.pause("coordinator", 1.0)),
            (2, self.exchange_trainers),
            (3, self.snapshot),
            (2, self.add_shard),
            (2, self.drain_shard),
        ]

    def happen(self, until: float) -> None:
        """Has things happen until a time (of ``time.monotonic``)."""
        while time.monotonic() < until and self.cluster.named("trainer"):
            weights, events = zip(*self._events, strict=True)
            self.draw.choices(events, weights)[0]()
            self.cluster.check_alive()
            time.sleep(0.2 + self.draw.random() * 1.5)

    def settle(self) -> None:
        """Waits for what goes on beside."""
        for future in self._under_way:
            future.result(60)
        self._beside.shutdown()

    def kill_shard(self) -> None:
        """Kills a shard, and starts it again on the same folder."""
        self._kill_and_start(self._one_of("shard"))

    def kill_coordinator(self) -> None:
        """Kills the coordinator, and starts it again."""
        self._kill_and_start("coordinator")

    def kill_trainer(self) -> None:
        """Kills a trainer; another one joins and takes its lanes over."""
        name = self._one_of("trainer")
        self._note(f"kill {name}")
        self.cluster.kill(name)
        self._add_trainer()

    def exchange_trainers(self) -> None:
        """Has two trainers join and one leave."""
        self._note("two trainers join, one leaves")
        leaving = self._one_of("trainer")
        self._add_trainer()
        if len(self.cluster.named("trainer")) < 4:
            self._add_trainer()
        self._do_beside(lambda: self.cluster.leave(leaving))

    def pause(self, role: str, leases: float) -> None:
        """Stops a process, for up to so many leases, and has it go on as if nothing had been."""
        name = self._one_of(role)
        seconds = self.draw.random() * leases * LEASE_SECONDS
        self._note(f"stop {name} for {seconds:.1f} s")
        self._do_beside(lambda: self.cluster.pause(name, seconds))

    def snapshot(self) -> None:
        """Has the coordinator take a snapshot, while other things happen."""
        self._note("snapshot")
        self._do_beside(lambda: self._ask(lambda client: client.snapshot()))

    def add_shard(self) -> None:
        """Adds a shard, to which buckets move."""
        if len(self.cluster.named("shard")) < 4:
            self._shards += 1
            self._note(f"shard-{self._shards} joins")
            self.cluster.start_shard(self._shards)

    def drain_shard(self) -> None:
        """Has a shard emptied while others may be killed."""
        if len(self.cluster.named("shard")) > 2:
            self._ask(lambda client: client.drain(self._some_shard(client)))

    def _some_shard(self, client: GrpcCoordinatorClient) -> int:
        numbers = [m.shard for m in client.status().members if m.shard is not None and m.shard_state == "active"]
        number = self.draw.choice(numbers)
        self._note(f"drain shard {number}")
        return number

    def _kill_and_start(self, name: str) -> None:
        self._note(f"kill {name}")
        self.cluster.kill(name)
        time.sleep(self.draw.random() * 0.5)
        self.cluster.start_again(name)

    def _add_trainer(self) -> None:
        self._trainers += 1
        self._note(f"trainer-{self._trainers} joins")
        self.cluster.start_trainer(self._trainers)

    def _one_of(self, role: str) -> str:
        return self.draw.choice(self.cluster.named(role))

    def _ask(self, question: Callable[[GrpcCoordinatorClient], object]) -> None:
        """Asks the coordinator, which may be dead, and shards, which may be: then it is as if nobody had asked."""
        client = GrpcCoordinatorClient(self.cluster.address, deadline_seconds=20)
        try:
            question(client)
        except (ConnectionError, TimeoutError, ValueError) as error:
            self._note(f"refused: {error}")
        finally:
            client.close()

    def _do_beside(self, act: Callable[[], None]) -> None:
        self._under_way.append(self._beside.submit(act))

    def _note(self, line: str) -> None:
        self.happened.append(line)
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def assert_sums(rows: RowsClient, samples: int, told: str) -> int:
    """Every row is the sum of the gradients of all samples, each of them once; returns how many rows there are."""
    compared = 0
    for table, (ids, weights) in enumerate(expected_rows(samples)):
        found = rows.pull([(table, ids)]).result()[0].rows
        _assert_same(found, weights, ids, f"{told}, table {table}")
        compared += len(found)
    return compared


def assert_hand_sums(rows: RowsClient, pusher: HandPusher, told: str) -> None:
    """A lane's rows hold all acknowledged pushes, and of later ones a bucket holds all of its rows or none."""
    done, begun = pusher.acknowledged, len(pusher.pushed)
    for table, config in enumerate(pusher.description.tables):
        ids = hand_ids(pusher.lane.lane, table)
        found = rows.pull([(table, ids)]).result()[0].rows
        allowed = [hand_rows(pusher.lane.lane, pusher.clocks(count))[table] for count in range(done, begun + 1)]
        buckets = buckets_of(ids, salt_of(config.name))
        for bucket in np.unique(buckets):
            here = buckets == bucket
            if not any((found[here] == some[here]).all() for some in allowed):
                _assert_same(found[here], allowed[0][here], ids[here], f"{told}, by hand, table {table}")


def _assert_same(found: np.ndarray, expected: np.ndarray, ids: np.ndarray, told: str) -> None:
    wrong = np.flatnonzero((found != expected).any(axis=1))
    assert not wrong.size, (
        f"{told}: {wrong.size} of {ids.size} rows differ, first id {ids[wrong[0]]}: expected {expected[wrong[0]]}, "
        f"got {found[wrong[0]]}"
    )


class Hands:
    """Pushers by hand beside trainers: one that goes on to the end, and others that are given up in the middle.

    Args:
        cluster: Running.
        description: Of the run.
    """

    def __init__(self, cluster: Cluster, description: RunDescription) -> None:
        self._description = description
        self.client = GrpcCoordinatorClient(cluster.address, deadline_seconds=60)
        self._is_over = threading.Event()
        self.lasting = HandPusher(self.client, description)
        self.given_up: list[HandPusher] = []
        self._thread = threading.Thread(target=self._push, name="hands", daemon=True)
        self._thread.start()

    def _push(self) -> None:
        while not self._is_over.wait(0.1):
            self.lasting.push()
            self.lasting.keep_alive()
            if len(self.lasting.pushed) % 20 == 10:
                with contextlib.suppress(ConnectionError, ValueError, TimeoutError):
                    brief = HandPusher(self.client, self._description, "brief")
                    brief.push(3)
                    brief.close()
                    self.given_up.append(brief)

    def check(self, told: str) -> None:
        """Waits for the lasting one's answers, and compares all rows."""
        self._is_over.set()
        self._thread.join()
        for push in self.lasting.pushed:
            push.result(120)
        assert self.lasting.acknowledged == len(self.lasting.pushed) > 0
        for pusher in [self.lasting, *self.given_up]:
            assert_hand_sums(self.lasting.rows, pusher, told)

    def close(self) -> None:
        """Ends the clients."""
        self._is_over.set()
        self._thread.join()
        self.lasting.close()
        self.client.close()

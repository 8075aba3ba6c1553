"""Exchanges of the dense part with a real server that dies in the middle of them end as if it had not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from embeddings import RowSGD, TableConfig
from parameter_server.client.dense_client import DenseClient, Part, Place
from parameter_server.dense_codec import PIECE, Combine, cut_pieces
from parameter_server.description import RunDescription
from parameter_server.partition import Routes, spread_evenly
from parameter_server.processes.rows_service import add_rows_service, make_server
from parameter_server.shard.shard import Shard
from parameter_server.transports import GrpcConnection, LocalConnection

NUMBER = 5 * PIECE + 7
TABLE = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))
RUN = RunDescription(run_id=7, seed=0, tables=(TABLE,), lanes=8)


class OneShard:
    """Routes that never change."""

    def __init__(self, address: str) -> None:
        self.routes = Routes(epoch=1, owners=spread_evenly([0]), addresses={0: address})

    def current(self) -> Routes:
        return self.routes

    def newer_than(self, epoch: int) -> Routes:
        return self.routes

    def start(self) -> Shard:
        shard = Shard(RUN, 0)
        shard.set_routes(self.routes)
        return shard


def exchange(routes: OneShard, connect: Callable[[str], Any]) -> list[Any]:
    """Brings a master and exchanges with it three times; returns the answers, and the master at the end."""
    pieces = np.arange(6, dtype=np.int64)
    vectors = [cut_pieces(np.random.default_rng(clock).normal(size=NUMBER).astype(np.float32)) for clock in range(4)]
    found: list[Any] = []
    with closing(DenseClient(7, routes, connect, deadline_seconds=20, say=lambda line: None)) as client:
        for clock, own in enumerate(vectors):
            combine = Combine.EASGD if clock else Combine.SET_IF_ABSENT
            part = Part(combine=combine, place=Place(8, 1, clock), pieces=pieces, values=own, factor=0.25)
            found += client.exchange([part], own, NUMBER)
        master = Part(combine=Combine.READ, place=Place(8, 1, 0), pieces=pieces, values=None)
        return found + client.exchange([master], vectors[-1], NUMBER)


class CutShort:
    """A real shard, the server of which dies twice in the middle of an exchange: before it is applied, and after."""

    def __init__(self, shard: Shard, address: str) -> None:
        self.shard, self.address, self.calls, self.deaths = shard, address, 0, 0
        self.restarted = threading.Event()
        self.restarting: list[threading.Thread] = []
        self.start()

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.shard, verb)

    def start(self) -> None:
        self.server = make_server()
        add_rows_service(self.server, self)
        self.server.add_insecure_port(self.address)
        self.server.start()

    def push_pull_dense(self, message: bytes) -> Any:
        self.calls += 1
        if self.calls == 3:
            self.die()
        parts = self.shard.push_pull_dense(message)
        if self.calls == 5:
            self.die()
        return parts

    def die(self) -> None:
        self.deaths += 1
        self.restarting.append(threading.Thread(target=self.restart, args=(self.server,)))
        self.restarting[-1].start()
        time.sleep(0.1)  # until the caller has lost its connection

    def restart(self, server: Any) -> None:
        server.stop(0).wait()
        self.start()

    def close(self) -> None:
        for thread in self.restarting:
            thread.join()
        self.server.stop(0).wait()
        self.shard.close()


def test_a_server_that_dies_in_the_middle_of_exchanges_changes_nothing(tmp_path: Path) -> None:
    routes = OneShard(f"unix:{tmp_path}/shard")
    with closing(routes.start()) as shard:
        expected = exchange(routes, lambda address: LocalConnection(shard))
    with closing(CutShort(routes.start(), f"unix:{tmp_path}/shard")) as server:
        for found, its in zip(exchange(routes, GrpcConnection), expected, strict=True):
            assert np.array_equal(found, its)
        assert server.deaths == 2
        assert server.calls >= 6

"""Exactly once, whatever happens: after all chaos every row is the sum of its gradients, each of them once.

Every round prints its seed where it fails; `CHAOS_SEED=<n> pytest tests/chaos/test_sum.py` repeats it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from byte_proxy import ByteFaults, ByteProxy
from chaos_round import assert_sums
from message_proxy import MessageFaults, MessageProxy
from sum_job import describe
from sum_trainer import train

from parameter_server.client.rows_client import RowsClient
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.partition import Routes
from parameter_server.processes.rows_service import add_rows_service, make_server
from parameter_server.shard.shard import Shard
from parameter_server.transports import GrpcConnection
from parameter_server.wire import Header, Op, encode, join

SEED = int(os.environ.get("CHAOS_SEED", "1"))
MESSAGES = MessageFaults(
    drop_request=0.08, drop_reply=0.08, duplicate=0.1, late=0.1, delay=0.2, delay_seconds=0.05, hang=0.05
)
PUSH = join([encode(Header(op=Op.PUSH))])[:7]  # what all pushes begin with: mark, version and op
BYTES = ByteFaults(
    reset=0.9,
    reset_bytes=200_000,
    delay=0.05,
    delay_seconds=0.01,
    silence=0.3,
    silence_seconds=0.3,
    unanswered=PUSH,
)


class LocalRun:
    """Shards behind gRPC servers and proxies, and a coordinator, all in this process."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder = folder
        self.description = replace(describe(samples=samples), run_id=5)
        self.coordinator = Coordinator(self.description, start_shards=2, lease_seconds=600)
        self.client = LocalCoordinatorClient(self.coordinator)
        self.shards: list[Shard] = []
        self.servers, self.proxies = [], []

    def add_shard(self, faults: MessageFaults | ByteFaults, seed: int) -> None:
        number = len(self.shards)
        shard = Shard(self.description, number, folder=self.folder / f"shard-{number}")
        server = make_server()
        add_rows_service(server, shard)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        kind = MessageProxy if isinstance(faults, MessageFaults) else ByteProxy
        self.proxies.append(kind(target, seed=seed + number, faults=faults))
        self.shards.append(shard)
        self.servers.append(server)
        assert self.coordinator.register("shard", f"shard-{number}", self.proxies[-1].address).shard == number

    def set_routes(self) -> Routes:
        routes = self.client.routes()
        for shard in self.shards:
            shard.set_routes(routes)
        return routes

    def lose_first_answers(self) -> None:
        """Cuts all connections of byte proxies once each shard has applied a push; no answer to one has come back."""
        end = time.monotonic() + 100
        while not all(shard.counts.pushes for shard in self.shards):
            assert time.monotonic() < end, f"seed {SEED}: no push has come"
            time.sleep(0.01)
        for proxy in self.proxies:
            if isinstance(proxy, ByteProxy):
                proxy.reset_all()  # first, as an answer may be on its way
                proxy.faults = replace(proxy.faults, unanswered=b"")

    def start_trainers(self, count: int) -> list[threading.Thread]:
        threads = [
            threading.Thread(
                target=train,
                args=(f"trainer-{number}", self.description, lambda: self.client, connect_soon),
                daemon=True,
            )
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        return threads

    def close(self) -> None:
        for proxy in self.proxies:
            proxy.close()
        for server, shard in zip(self.servers, self.shards, strict=True):
            server.stop(None).wait()
            shard.close()
        self.coordinator.close()


def connect_soon(address: str) -> GrpcConnection:
    """Connects so that lost calls are soon known to be lost."""
    return GrpcConnection(address, call_seconds=1.0)


@pytest.fixture
def local_run(tmp_path: Path) -> Iterator[LocalRun]:
    run = LocalRun(tmp_path, samples=6_000)
    yield run
    run.close()


@pytest.mark.parametrize("faults", [MESSAGES, BYTES], ids=["messages", "bytes"])
def test_the_sum_is_right_behind_a_network_that_misbehaves(
    local_run: LocalRun, faults: MessageFaults | ByteFaults
) -> None:
    for _ in range(2):
        local_run.add_shard(faults, SEED)
    local_run.set_routes()
    trainers = local_run.start_trainers(2)
    local_run.lose_first_answers()
    for thread in trainers:
        thread.join(120)
        assert not thread.is_alive(), f"seed {SEED}"
    for proxy in local_run.proxies:
        if isinstance(proxy, MessageProxy):
            assert all(proxy.met[fault] for fault in ("drop_request", "drop_reply", "duplicate", "late", "delay"))
            proxy.faults = MessageFaults()
        else:
            assert proxy.harmed > 2
            proxy.faults = ByteFaults()
            proxy.reset_all()
    assert all(shard.counts.duplicates for shard in local_run.shards), f"seed {SEED}: nothing was sent twice"
    client = RowsClient(local_run.description, CoordinatorRoutes(local_run.client), connect_soon)
    try:
        assert assert_sums(client, local_run.description.samples, f"seed {SEED}") > 0
    finally:
        client.close()

"""Processes as people start them: a shard joins and another is drained under pushes, and the coordinator is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.client.frame_cutting import Push
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.description import RunDescription
from parameter_server.transports import GrpcConnection

IDS, DIM = 20_000, 16
TABLE = TableConfig(
    name="t", num_rows=IDS, dim=DIM, features=("f",), init_scale=0.0, optimizer=RowSGD(learning_rate=1.0)
)
RUN = RunDescription(run_id=5, seed=0, durability="journal", tables=(TABLE,))
PROGRAM = "import sys; from deploy.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.long
def test_a_killed_coordinator_goes_on_moving_buckets(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/c.sock"
    with ExitStack() as stack:

        def start(part: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", PROGRAM, "ps", part, "--folder", f"{tmp_path}/{name}"]
            process = subprocess.Popen(
                [*command, "--address", f"unix:{tmp_path}/{name}.sock", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        coordinator = start("coordinator", "c", "--lease-seconds", "60")
        client = stack.enter_context(closing(GrpcCoordinatorClient(where, deadline_seconds=120)))
        member = client.register("client", "test", description_json=RUN.to_json()).member
        first = start("shard", "a", "--coordinator", where, "--name", "a")
        source, lane = CoordinatorRoutes(client), client.client_lane(member)
        rows = stack.enter_context(closing(RowsClient(RUN, source, GrpcConnection, deadline_seconds=100)))
        random, pushed, slowest = np.random.default_rng(0), np.zeros(IDS), 0.0
        clock = 0

        def push_until(is_done: Callable[[], bool]) -> None:
            nonlocal clock, slowest
            while not is_done():
                ids = np.unique(random.integers(0, IDS, 500))
                clock, began = clock + 1, time.monotonic()
                given = Push(table=0, ids=ids, gradients=np.ones((ids.size, DIM), np.float32))
                rows.push(LaneLease(lane.lane, lane.lease), clock, [given]).result(100)
                pushed[ids] += 1
                if clock > 1:  # the first one compiles kernels
                    slowest = max(slowest, time.monotonic() - began)

        def held() -> int:
            return sum(it.buckets for it in client.status().members if it.name == "b")

        push_until(lambda: clock >= 10)
        start("shard", "b", "--coordinator", where, "--name", "b")
        push_until(lambda: held() >= 300)
        coordinator.kill()
        coordinator.wait()
        alone = clock + 50
        push_until(lambda: clock >= alone)
        start("coordinator", "c")
        push_until(lambda: held() == 2048)
        client.drain(0)
        push_until(lambda: client.heartbeat(member).known and first.poll() is not None)
        assert first.returncode == 0
        assert held() == 4096
        (pulled,) = rows.pull([(0, np.arange(IDS))]).result(60)
        np.testing.assert_array_equal(pulled.rows, np.repeat(-pushed[:, None], DIM, 1))
        assert client.status().longest_freeze_seconds < 1
        assert slowest < 2

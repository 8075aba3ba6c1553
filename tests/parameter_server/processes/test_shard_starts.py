"""What a shard finds in its folder when it starts: what is lost is told, and rows that are not there are missed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from embeddings.tables import TableConfig
from parameter_server.client.frame_cutting import Push
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.coordinator_service import SERVICE, CoordinatorService
from parameter_server.control.routes_source import FixedRoutes
from parameter_server.coordinator.answers import Chunk
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.partition import Routes, spread_evenly
from parameter_server.processes import shard_process
from parameter_server.processes.config import ShardConfig
from parameter_server.processes.endpoint import Endpoint
from parameter_server.processes.logs import EventFormatter
from parameter_server.security.security import ServerSecurity
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

RUN = RunDescription(
    run_id=7,
    seed=1,
    tables=(TableConfig(name="site", num_rows=100, dim=4),),
    samples=20,
    batch_size=10,
    chunk_batches=1,
)


class Ready(EventFormatter):
    """Asks the process to end once it is ready."""

    def tell_ready(self, address: str) -> None:
        threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGTERM)).start()


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    """A coordinator at `unix:c`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    endpoint = Endpoint(ServerSecurity())
    with closing(Coordinator(RUN)) as made:
        CoordinatorService(made).add_to(endpoint.server)
        endpoint.listen("unix:c")
        endpoint.start([SERVICE])
        yield made
        endpoint.stop(0.0)


def serve(folder: str) -> None:
    config = ShardConfig(coordinator="unix:c", address="unix:s", folder=Path(folder), name="shard-0")
    shard_process.serve(config, Ready("text", "test"))


@pytest.mark.usefixtures("coordinator")
def test_what_a_crash_has_taken_is_told(caplog: pytest.LogCaptureFixture) -> None:
    routes = Routes(epoch=1, owners=spread_evenly([0]), addresses={0: "local:0"})
    with closing(Shard(RUN, 0, folder=Path("shard-0"))) as shard:
        shard.set_routes(routes)
        with closing(RowsClient(RUN, FixedRoutes(routes), lambda _: LocalConnection(shard))) as client:
            given = Push(table=0, ids=np.arange(3), gradients=np.ones((3, 4), np.float32))
            client.push(LaneLease(0, 1), 1, [given]).result(60)
    with caplog.at_level(logging.WARNING):  # no snapshot was taken
        serve("shard-0")
    assert "shard-0: 1 pushes that were acknowledged are lost, all told" in caplog.text


def test_a_new_folder_does_not_stand_in_for_one_with_rows(coordinator: Coordinator) -> None:
    serve("first")
    serve("second")  # nothing has been trained yet
    trainer = coordinator.register("trainer", "t").member
    chunk = coordinator.next_chunk(trainer)
    assert isinstance(chunk, Chunk)
    coordinator.complete_chunk(trainer, chunk.lane, chunk.lease, chunk.index)
    for _ in range(2):  # nor by being there once the first try has failed
        with pytest.raises(ValueError, match="--folder third: expected the folder of shard-0, which has held rows of"):
            serve("third")
    serve("second")
